//! What the documentation says works: commands run, flags exist, links lead somewhere.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::{CommandFactory, Parser};
use quantc::cli::Cli;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README.md and everything under docs/.
fn documents() -> Vec<PathBuf> {
    let mut found = vec![root().join("README.md")];
    for folder in ["docs", "docs/formats"] {
        let entries = std::fs::read_dir(root().join(folder)).unwrap().map(|e| e.unwrap().path());
        found.extend(entries.filter(|path| path.extension().is_some_and(|e| e == "md")));
    }
    found.sort();
    found
}

/// A fenced block.
struct Block {
    language: String,
    line: usize,
    text: String,
}

fn blocks(document: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let mut open = false;
    for (index, line) in document.lines().enumerate() {
        match (line.strip_prefix("```"), open) {
            (Some(language), false) => {
                found.push(Block { language: language.to_owned(), line: index + 1, text: String::new() });
                open = true;
            }
            (Some(_), true) => open = false,
            (None, true) => {
                let text = &mut found.last_mut().expect("open").text;
                *text += line;
                text.push('\n');
            }
            (None, false) => {}
        }
    }
    assert!(!open, "a block is not closed");
    found
}

/// Commands of a block, lines continued with a backslash joined.
fn commands(block: &Block) -> Vec<String> {
    block.text.replace("\\\n", " ").lines().map(|line| line.trim().to_owned()).collect()
}

/// The words of a command up to the first thing that only a shell understands.
fn words(command: &str) -> Vec<String> {
    let plain = |word: &&str| !["||", "&&", "|", ">", "#"].contains(word);
    command.split_whitespace().take_while(plain).map(|w| w.trim_end_matches(';').to_owned()).collect()
}

/// What `cargo SUBCOMMAND -h` prints, to look flags up in.
fn cargo_help(subcommand: &str) -> String {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let output = Command::new(cargo).args([subcommand, "-h"]).output().unwrap();
    assert!(output.status.success(), "cargo has no subcommand `{subcommand}`");
    String::from_utf8(output.stdout).unwrap()
}

/// Fails unless cargo knows the subcommand and its flags, and quantc what comes after `--`.
fn check_cargo(command: &str) {
    let words = words(command);
    let help = cargo_help(&words[1]);
    let (own, rest) = words[2..].split_at(words[2..].iter().position(|w| w == "--").unwrap_or(words.len() - 2));
    for flag in own.iter().filter(|w| w.starts_with('-')) {
        let known = help.split([' ', ',', '[', '=', '\n']).any(|word| word == flag);
        assert!(known, "cargo {} has no flag {flag}", words[1]);
    }
    if words[1] == "run" {
        check_quantc(rest.iter().skip(1).map(String::as_str));
    }
}

/// Fails unless the command line parses.
fn check_quantc<'a>(arguments: impl Iterator<Item = &'a str>) {
    if let Err(error) = Cli::try_parse_from(["quantc"].into_iter().chain(arguments)) {
        panic!("{error}");
    }
}

#[test]
fn commands_of_the_documentation_run() {
    let program = Path::new(env!("CARGO_BIN_EXE_quantc"));
    let mut path = OsString::from(program.parent().unwrap());
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let mut ran = 0;
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        // The blocks of a document follow one another in one directory, as they do for a reader.
        let room = tempfile::tempdir().unwrap();
        for block in blocks(&text).iter().filter(|block| block.language == "sh") {
            let place = format!("{}:{}", document.display(), block.line);
            if block.text.starts_with("cargo ") {
                commands(block).iter().for_each(|command| check_cargo(command));
                continue;
            }
            let output = Command::new("bash")
                .args(["-e", "-c", &block.text])
                .current_dir(room.path())
                .env("PATH", &path)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{place}: {}\n{}\n{said}", output.status, block.text);
            ran += 1;
        }
    }
    assert!(ran >= 6, "only {ran} blocks were run: the documentation has lost its examples");
}

#[test]
fn flags_of_the_documentation_exist() {
    let mut seen = 0;
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        for block in blocks(&text) {
            for command in commands(&block).iter().filter(|c| c.starts_with("quantc ")) {
                check_quantc(words(command)[1..].iter().map(String::as_str));
                seen += 1;
            }
        }
    }
    assert!(seen >= 12, "only {seen} commands are shown");
}

#[test]
fn links_of_the_documentation_lead_somewhere() {
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        let folder = document.parent().unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = target.split('#').next().unwrap_or_default();
            if file.is_empty() || target.starts_with("https://") {
                continue;
            }
            assert!(folder.join(file).exists(), "{}: {target} is not there", document.display());
        }
    }
}

#[test]
fn every_command_and_recipe_key_is_in_the_readme() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    for command in Cli::command().get_subcommands() {
        assert!(readme.contains(&format!("quantc {} ", command.get_name())), "{}", command.get_name());
    }
    let recipe = serde_json::to_value(quantc::recipe::Request::default()).unwrap();
    for key in recipe.as_object().unwrap().keys() {
        assert!(readme.contains(&format!("`{key}`")) || readme.contains(&format!("[[{key}]]")), "recipe key {key}");
    }
}
