//! Every kernel is compiled for old and new cards, where NVRTC is there: no card is needed.

use rayon::prelude::*;

use super::super::compile::{MODULES, compile, compiler_is_there};

/// Registers, spilled bytes and stack bytes of each kernel, out of the compiler's log.
fn resources(log: &str) -> Vec<(String, [usize; 3])> {
    let number = |text: &str, before: &str| -> usize {
        let at = text.find(before).unwrap_or(0);
        text[..at].trim_end().rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    let mut found: Vec<(String, [usize; 3])> = Vec::new();
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            found.push((rest.split('\'').next().unwrap_or("").to_owned(), [0; 3]));
        }
        let Some((_, last)) = found.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            last[1] = number(line, " bytes spill stores") + number(line, " bytes spill loads");
            last[2] = number(line, " bytes stack frame");
        }
        if line.contains(" registers") {
            last[0] = number(line, " registers");
        }
    }
    found
}

#[test]
fn kernels_compile_for_every_card_without_warnings_and_spills() {
    if !compiler_is_there() {
        super::skip("no NVRTC, so kernels are not compiled for cards (pip install nvidia-cuda-nvrtc)");
        return;
    }
    let all: Vec<_> =
        MODULES.iter().flat_map(|module| [75, 80, 90, 120].map(|capability| (*module, capability))).collect();
    let compiled = all.par_iter().map(|(module, capability)| {
        let compiled = compile(module, *capability, true).unwrap();
        assert!(compiled.image.starts_with(b"\x7fELF"), "machine code");
        let log = &compiled.log;
        assert!(!log.contains("warning"), "{} for sm_{capability}:\n{log}", module.name);
        let kernels = resources(log).into_iter().map(|(kernel, [registers, spilled, stack])| {
            assert!(registers > 0, "{kernel}: {log}");
            assert_eq!((spilled, stack), (0, 0), "{kernel} for sm_{capability}: bytes spilled, bytes of stack\n{log}");
            format!("{} {kernel} sm_{capability}: {registers} registers", module.name)
        });
        kernels.collect::<Vec<_>>()
    });
    let table: Vec<String> = compiled.flatten_iter().collect();
    // Each kernel that is exported is one that cards get; some are made by macros.
    let exported: usize = MODULES.iter().map(|module| module.source.matches("\nEXPORT(").count()).sum();
    assert!(table.len() >= 4 * exported && exported > 30, "{} of {exported} kernels", table.len() / 4);
    println!("{}", table.join("\n"));
}

#[test]
fn an_unknown_card_gets_portable_code_and_a_mistake_is_shown() {
    if !compiler_is_there() {
        super::skip("no NVRTC");
        return;
    }
    let later = compile(&super::super::forward::NORM, 999, false).unwrap();
    assert!(String::from_utf8_lossy(&later.image).contains(".visible .entry norm_slices"));
    static BROKEN: super::super::Module =
        super::super::Module { name: "broken", source: "KERNEL(broken)() { nothing; }" };
    let error = compile(&BROKEN, 80, false).unwrap_err().to_string();
    assert!(error.contains("broken.cu(1)") && error.contains("nothing"), "{error}");
}
