//! Files for images that are not written: what is in their place, what is wrong with the tensors and the settings that they are made of.

use kernels::Cpu;
use quantc::job::{Asked, Job};
use quantc::progress::Progress;
use quantc::recipe::Recipe;

use crate::wrappers::model;

/// Before anything is read that the work needs, as the calibration text that is not there.
#[test]
fn a_place_that_is_taken_is_told_before_the_work_and_by_planning() {
    let (room, outputs) = (model("qwen3_vl_vision"), tempfile::tempdir().unwrap());
    let (output, beside) = (outputs.path().join("m.gguf"), outputs.path().join("mmproj-m.gguf"));
    std::fs::write(&beside, "GGUF of somebody").unwrap();
    let job = |force: bool| {
        let toml = "format = 'gguf'\nscheme = 'Q4_0'\nmethod = 'gptq'\ncalibration = 'gone.txt'";
        let recipe = Recipe::resolve(toml::from_str(toml).unwrap()).unwrap();
        Job::one(room.path(), &output, recipe, None, force)
    };
    let asked = Asked { named: true, ..Asked::default() };
    let plan = |force: bool| job(force).plan(&Cpu::exact(), &asked, &Progress::new(true)).map(drop).unwrap_err();
    let run = job(false).run_one(&Cpu::exact(), &mut Progress::new(true)).unwrap_err();
    for error in [run, plan(false)] {
        assert!(error.to_string().contains("mmproj-m.gguf: exists already; --force replaces it"), "{error}");
        assert!(matches!(error, quantc::Error::Usage(_)), "{error}");
    }
    assert!(plan(true).to_string().contains("gone.txt"));
    std::fs::write(&beside, "a letter").unwrap();
    assert!(plan(true).to_string().contains("--force replaces a GGUF file, and this is none"));
    assert_eq!(std::fs::read_dir(outputs.path()).unwrap().count(), 1);
}
