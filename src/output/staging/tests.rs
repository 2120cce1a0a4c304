use super::*;
use crate::output::sweep;

/// The names in a folder, hidden ones too.
fn listed(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_file_replaces_itself_and_nothing_beside_it() {
    let room = tempfile::tempdir().unwrap();
    let at = |name: &str| room.path().join(name);
    let write = |names: &[&str], content: &[u8], force| -> Result<()> {
        let staging = Staging::gguf(&at("m.gguf"), None, force, None)?;
        names.iter().try_for_each(|name| staging.write(name, content))?;
        staging.commit().map(drop)
    };
    drop(Staging::gguf(&at("m.gguf"), None, false, None).unwrap());
    assert!(listed(room.path()).is_empty());
    fs::write(at("m-other.gguf"), b"GGUF").unwrap();
    let parts = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"];
    write(&parts, b"GGUF", false).unwrap();
    assert!(
        write(&["m.gguf"], b"GGUF", false).unwrap_err().to_string().contains("m-00001-of-00002.gguf: exists already")
    );
    // Parts that are not of this output stay.
    write(&["m.gguf", "m.gguf.report.json"], b"GGUF", true).unwrap();
    let all = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "m-other.gguf", "m.gguf", "m.gguf.report.json"];
    assert_eq!(listed(room.path()), all);
    write(&parts, b"GGUF again", true).unwrap();
    assert_eq!(listed(room.path()), all);
    assert_eq!(fs::read(at(parts[1])).unwrap(), b"GGUF again");
    fs::write(at("m.gguf"), b"letter").unwrap();
    assert!(write(&["m.gguf"], b"GGUF", true).unwrap_err().to_string().contains("this is none"));
    let own = Staging::gguf(&at("m-other.gguf"), Some(&at("m-other.gguf")), true, None).err().unwrap();
    assert!(own.to_string().contains("may not be the input"));
}

#[test]
fn only_a_model_directory_is_replaced() {
    let room = tempfile::tempdir().unwrap();
    let out = room.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("config.json"), b"{}").unwrap();
    fs::write(out.join("thesis.txt"), b"dear").unwrap();
    let refused = |words: &str| {
        let error = Staging::folder_for(&out, None, true, None).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
    };
    refused("this has no weights");
    fs::write(out.join("model.safetensors"), b"").unwrap();
    drop(Staging::folder_for(&out, None, true, None).unwrap());
    fs::create_dir(out.join(".git")).unwrap();
    refused("this holds .git");
    assert_eq!(fs::read(out.join("thesis.txt")).unwrap(), b"dear");
    // What is called as staging folders are would be swept by the next run.
    let hidden = Staging::folder_for(&room.path().join(".out.partial-abcdefgh"), None, false, None).err().unwrap();
    assert!(hidden.to_string().contains("unfinished outputs"));
}

#[test]
fn where_the_model_cannot_be_moved_the_earlier_report_is_still_there() {
    let room = tempfile::tempdir().unwrap();
    let at = |name: &str| room.path().join(name);
    fs::write(at("m.gguf"), b"GGUF").unwrap();
    fs::write(at("m.gguf.report.json"), b"old").unwrap();
    let mut staging = Staging::gguf(&at("m.gguf"), None, true, None).unwrap();
    staging.write("m.gguf", b"GGUF").unwrap();
    staging.write("m.gguf.report.json", b"new").unwrap();
    // No file replaces a folder, so the last step fails.
    fs::remove_file(at("m.gguf")).unwrap();
    fs::create_dir(at("m.gguf")).unwrap();
    staging.found.as_mut().unwrap().push((at("m.gguf"), number(&at("m.gguf"))));
    staging.commit().unwrap_err();
    assert_eq!(listed(room.path()), ["m.gguf", "m.gguf.report.json"]);
    assert_eq!(fs::read(at("m.gguf.report.json")).unwrap(), b"old");
}

#[test]
fn what_would_stop_another_file_is_told_beforehand() {
    let room = tempfile::tempdir().unwrap();
    let at = |name: &str| room.path().join(name);
    fs::write(at("in.gguf"), b"GGUF").unwrap();
    let staging = Staging::gguf(&at("m.gguf"), Some(&at("in.gguf")), false, None).unwrap();
    let check = |name: &str, force| staging.check_another(&at(name), Some(&at("in.gguf")), force);
    fs::write(at("old.gguf"), b"GGUF").unwrap();
    fs::write(at("letter"), b"dear").unwrap();
    fs::create_dir(at("folder")).unwrap();
    for (name, force, expected) in [
        ("none/i.gguf", true, "there is no folder"),
        ("letter/i.gguf", true, "there is no folder"),
        ("folder", true, "is a directory"),
        ("old.gguf", false, "old.gguf: exists already; --force replaces it"),
        ("letter", true, "this is none"),
        ("in.gguf", true, "may not be the input"),
        ("m.gguf", true, "the quantized model"),
        ("folder/../m-00001-of-00002.gguf", true, "the quantized model"),
        ("m.gguf.report.json", true, "the quantized model"),
        ("m.gguf.README.md", true, "the quantized model"),
    ] {
        let error = check(name, force).unwrap_err();
        assert!(error.to_string().contains(expected), "{name}: {error}");
        assert_eq!(error.exit_code(), 2, "{name}: {error}");
    }
    for (name, force) in [("i.gguf", false), ("folder/m.gguf", false), ("old.gguf", true)] {
        check(name, force).unwrap();
    }
    assert_eq!(fs::read(at("old.gguf")).unwrap(), b"GGUF");
    assert_eq!(fs::read_dir(at("folder")).unwrap().count(), 0);
    #[cfg(target_os = "linux")]
    {
        // No one may write there, not even who may write anywhere.
        let error = staging.check_another(Path::new("/proc/i.gguf"), None, false).unwrap_err();
        assert!(error.to_string().contains("takes no file") && error.exit_code() == 2, "{error}");
    }
}

#[test]
fn nothing_appears_until_it_is_committed_and_nothing_else_is_replaced() {
    let room = tempfile::tempdir().unwrap();
    let at = |name: &str| room.path().join(name);
    fs::create_dir(at("in")).unwrap();
    let message =
        |target: &Path, force| Staging::folder_for(target, Some(&at("in")), force, None).err().unwrap().to_string();
    assert!(message(&at("in"), true).contains("may not be the input"));
    assert!(message(&at("in/out"), true).contains("may not be the input"));
    assert!(message(room.path(), true).contains("may not be the input"));
    assert!(message(&at("in/../in/deep/out"), true).contains("may not be the input"));

    let staging = Staging::folder_for(&at("a/b/out"), Some(&at("in")), false, None).unwrap();
    staging.write("config.json", b"1").unwrap();
    drop(staging);
    assert_eq!(listed(room.path()), ["in"], "folders made for the output go with it");

    let write = |content: &[u8], force| -> Result<()> {
        let staging = Staging::folder_for(&at("a/out"), Some(&at("in")), force, None)?;
        staging.write("config.json", content)?;
        staging.write("model.safetensors", content)?;
        staging.commit().map(drop)
    };
    fs::create_dir_all(at("a/out")).unwrap();
    write(b"1", false).unwrap();
    assert!(write(b"2", false).unwrap_err().to_string().contains("--force"));
    assert_eq!(fs::read(at("a/out/config.json")).unwrap(), b"1");
    write(b"2", true).unwrap();
    assert_eq!(fs::read(at("a/out/config.json")).unwrap(), b"2");
    assert_eq!(listed(&at("a")), ["out"]);

    fs::create_dir(at("home")).unwrap();
    fs::write(at("home/letter"), b"dear").unwrap();
    assert!(message(&at("home"), true).contains("this is none"));
    fs::write(at("file"), b"dear").unwrap();
    assert!(message(&at("file"), true).contains("is a file"));
}

#[test]
fn what_appears_during_the_run_stays_and_so_does_the_work() {
    let room = tempfile::tempdir().unwrap();
    let at = |name: &str| room.path().join(name);
    for (number, kept) in ["out.finished", "out.finished-2"].into_iter().enumerate() {
        let _ = fs::remove_dir_all(at("out"));
        let staging = Staging::folder_for(&at("out"), None, false, None).unwrap();
        staging.write("config.json", b"new").unwrap();
        fs::create_dir(at("out")).unwrap();
        fs::write(at("out/letter"), b"dear").unwrap();
        let error = staging.commit().unwrap_err().to_string();
        assert!(error.contains("something appeared there") && error.ends_with(kept), "{number}: {error}");
        assert_eq!(fs::read(at(kept).join("config.json")).unwrap(), b"new");
        assert_eq!(listed(&at("out")), ["letter"]);
    }
    // What --force may replace is what was there at the beginning.
    fs::remove_dir_all(at("out")).unwrap();
    for begun_with_one in [false, true] {
        if begun_with_one {
            fs::create_dir(at("out")).unwrap();
            fs::write(at("out/config.json"), b"old").unwrap();
            fs::write(at("out/model.safetensors"), b"old").unwrap();
        }
        let staging = Staging::folder_for(&at("out"), None, true, None).unwrap();
        staging.write("config.json", b"new").unwrap();
        if begun_with_one {
            fs::rename(at("out"), at("elsewhere")).unwrap();
        }
        fs::create_dir(at("out")).unwrap();
        fs::write(at("out/letter"), b"dear").unwrap();
        assert!(staging.commit().unwrap_err().to_string().contains("something appeared there"));
        assert_eq!(listed(&at("out")), ["letter"]);
        fs::remove_dir_all(at("out")).unwrap();
    }
    let staging = Staging::gguf(&at("f.gguf"), None, true, None).unwrap();
    staging.write("f.gguf", b"GGUF new").unwrap();
    fs::write(at("f.gguf"), b"dear").unwrap();
    assert!(staging.commit().unwrap_err().to_string().contains("something appeared there"));
    assert_eq!(fs::read(at("f.gguf")).unwrap(), b"dear");
    let staging = Staging::gguf(&at("m.gguf"), None, false, None).unwrap();
    staging.write("m.gguf", b"GGUF new").unwrap();
    fs::write(at("m.gguf"), b"dear").unwrap();
    assert!(staging.commit().unwrap_err().to_string().ends_with("m.gguf.finished"));
    assert_eq!(fs::read(at("m.gguf")).unwrap(), b"dear");
    assert_eq!(fs::read(at("m.gguf.finished/m.gguf")).unwrap(), b"GGUF new");
    assert!(listed(room.path()).iter().all(|name| !name.starts_with('.')));
}

#[test]
#[cfg(unix)]
fn what_a_run_that_is_gone_has_left_is_swept_and_what_one_at_work_holds_is_not() {
    let room = tempfile::tempdir().unwrap();
    let at = |name: &str| room.path().join(name);
    for left in [".out.partial-A1234567", ".out.partial-aBcDeFgH", ".out.partial-old"] {
        fs::create_dir(at(left)).unwrap();
        fs::write(at(left).join("model.safetensors"), b"half").unwrap();
    }
    let first = Staging::folder_for(&at("out"), None, false, None).unwrap();
    assert_eq!(first.notes().len(), 2, "{:?}", first.notes());
    assert!(first.notes()[0].ends_with(".out.partial-A1234567: removed what an interrupted run had left"));
    let second = Staging::folder_for(&at("out"), None, false, None).unwrap();
    assert!(second.notes().is_empty() && first.folder().exists());
    assert_eq!(listed(room.path()).len(), 3, "what somebody else called so stays");
    drop((first, second));
    assert_eq!(listed(room.path()), [".out.partial-old"]);

    // Between the two steps of a file system that cannot exchange names.
    let place = Place::resolve(&at("out")).unwrap();
    fs::create_dir(aside_of(&place)).unwrap();
    fs::write(aside_of(&place).join("config.json"), b"old").unwrap();
    assert!(sweep(&place).unwrap()[0].contains("it is back"));
    assert_eq!(fs::read(at("out/config.json")).unwrap(), b"old");
    fs::create_dir(aside_of(&place)).unwrap();
    assert!(sweep(&place).unwrap()[0].contains("had replaced"));
    assert_eq!(listed(room.path()), [".out.partial-old", "out"]);
}

#[test]
#[cfg(unix)]
fn links_stay_links_and_modes_follow_the_umask() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let room = tempfile::tempdir().unwrap();
    let at = |name: &str| room.path().join(name);
    fs::create_dir(at("disk")).unwrap();
    symlink("disk", at("link")).unwrap();
    let staging = Staging::folder_for(&at("link"), None, false, None).unwrap();
    staging.write("config.json", b"{}").unwrap();
    staging.commit().unwrap();
    assert!(fs::symlink_metadata(at("link")).unwrap().is_symlink());
    assert_eq!(listed(&at("disk")), ["config.json"]);
    fs::create_dir(at("plain")).unwrap();
    let mode = |name: &str| fs::metadata(at(name)).unwrap().permissions().mode();
    assert_eq!(mode("disk"), mode("plain"));
}

#[test]
fn long_names_leave_place_for_the_hidden_ones() {
    for name in ["n".repeat(255), "ö".repeat(127)] {
        let hidden = hidden_prefix(&name);
        assert!(hidden.len() + RANDOM <= LONGEST_NAME && hidden.starts_with('.') && hidden.ends_with(MARK));
    }
    assert_eq!(hidden_prefix("out"), ".out.partial-");
}

#[test]
fn an_output_is_called_what_it_will_be_called() {
    let path = |parts: &[&str]| parts.iter().collect::<PathBuf>().display().to_string();
    let told = |output: &str, staged: String, single| without_hidden_names(&staged, Path::new(output), single);
    for (output, staged, single, expected) in [
        ("out", path(&[".", ".out.partial-aB3", "config.json"]), false, path(&["out", "config.json"])),
        ("a/out", path(&["a", ".out.partial-x", "config.json"]), false, path(&["a", "out", "config.json"])),
        ("a/out", path(&["a", ".out.partial-x"]), false, path(&["a", "out"])),
        ("m.gguf", path(&[".", ".m.gguf.partial-x", "m-00001-of-00002.gguf"]), true, path(&["m-00001-of-00002.gguf"])),
        ("a/m.gguf", path(&["a", ".m.gguf.partial-x", "m.gguf"]), true, path(&["a", "m.gguf"])),
        ("a/m.gguf", path(&["a", ".m.gguf.partial-x"]), true, path(&["a", "m.gguf"])),
        ("out", path(&["model", "config.json"]), false, path(&["model", "config.json"])),
    ] {
        assert_eq!(
            told(output, format!("{staged}: cannot write: full"), single),
            format!("{expected}: cannot write: full")
        );
    }
}
