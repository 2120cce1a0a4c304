//! Schemes whose runtimes round what linears read: quality is measured as the runtime computes.

use serde_json::Value;

use crate::harness::Room;

/// Perplexity and KL of `eval` with these flags, and how it says that linears read.
fn measured(room: &Room, flags: &[&str]) -> (String, f64, f64) {
    let mut all = vec!["eval", "OUT", "--reference", "model", "--windows", "2", "--context", "128", "--json"];
    all.extend(flags);
    let run = room.run(all);
    run.succeeds();
    let found: Value = serde_json::from_str(&run.stdout()).unwrap();
    let number = |key: &str| found[key].as_f64().unwrap();
    (found["activations"].as_str().unwrap().to_owned(), number("perplexity"), number("kld_mean"))
}

#[test]
fn what_a_runtime_rounds_is_rounded_where_quality_is_measured() {
    for scheme in ["W8A8", "FP8_DYNAMIC"] {
        let room = Room::new();
        room.model();
        let flags = ["--scheme", scheme, "--method", "rtn", "--verify-windows", "2"];
        let mut all = vec!["quantize", "model", "-o", "OUT"];
        all.extend(flags);
        room.run(all).succeeds();
        let report: Value = serde_json::from_slice(&std::fs::read(room.path("OUT/report.json")).unwrap()).unwrap();
        assert_eq!(report["quality"]["activations"], "runtime", "{scheme}");
        let notes = report["notes"].to_string();
        assert!(notes.contains("token by token, and so does the measurement"), "{notes}");
        let (said, as_run, kld) = measured(&room, &[]);
        let (exactly, weights_alone, less) = measured(&room, &["--activations", "exact"]);
        assert_eq!((&said[..], &exactly[..]), ("runtime", "exact"));
        assert!(kld > 1.05 * less && as_run != weights_alone, "{scheme}: {kld} with rounded inputs, {less} without");
        assert!(kld < 20.0 * less.max(1e-4), "{scheme}: {kld}");
    }
}
