//! What the documentation says works: commands run, flags exist, links lead somewhere, and the book has every page.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::{CommandFactory, Parser};
use quantc::cli::Cli;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The lines that README.md may have: one screen, or little more.
const README_LINES: usize = 130;

/// README.md and every page under docs/.
fn documents() -> Vec<PathBuf> {
    let mut found = pages();
    found.push(root().join("README.md"));
    found.sort();
    found
}

/// Every page under docs/, with its table of contents.
fn pages() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root().join("docs")];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "md") {
                found.push(path);
            }
        }
    }
    found
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

/// The targets of a document's links.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| rest.split(')').next())
}

/// The anchors of a document's headings, as GitHub and mdBook make them.
fn anchors(text: &str) -> Vec<String> {
    let mut fenced = false;
    let mut found = Vec::new();
    for line in text.lines() {
        fenced ^= line.starts_with("```");
        let heading = line.trim_start_matches('#');
        if !fenced && heading.len() < line.len() {
            let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            found.push(kept.collect::<String>().to_lowercase().replace(' ', "-"));
        }
    }
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

/// Commands of a block, lines continued with a backslash joined, without what is said of them in a column of its own.
fn commands(block: &Block) -> Vec<String> {
    let joined: Vec<&str> =
        block.text.split("\\\n").map(|piece| piece.trim_start_matches(' ').trim_end_matches(' ')).collect();
    let command = |line: &str| line.trim().split("  ").next().unwrap_or_default().to_owned();
    joined.join(" ").lines().map(command).collect()
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
    let documents: Vec<_> = documents().iter().map(|document| document.to_str().unwrap().to_owned()).collect();
    let ran: usize = crate::families::each(&documents, |document| {
        let (text, mut ran) = (std::fs::read_to_string(document).unwrap(), 0);
        // The blocks of a document follow one another in one directory, as they do for a reader.
        let room = tempfile::tempdir().unwrap();
        for block in blocks(&text).iter().filter(|block| block.language == "sh") {
            let place = format!("{document}:{}", block.line);
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
        ran
    })
    .into_iter()
    .sum();
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
    let book = root().join("docs");
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        let folder = document.parent().unwrap();
        for target in links(&text).filter(|target| !target.starts_with("https://")) {
            let place = format!("{}: {target}", document.display());
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let file = if file.is_empty() { document.clone() } else { folder.join(file) };
            assert!(file.exists(), "{place} is not there");
            let outside = document.starts_with(&book) && !file.canonicalize().unwrap().starts_with(&book);
            assert!(!outside, "{place} leads out of the book, where a reader of the book finds nothing");
            if !anchor.is_empty() {
                let found = anchors(&std::fs::read_to_string(&file).unwrap());
                assert!(found.iter().any(|heading| heading == anchor), "{place}: there are only {found:?}");
            }
        }
    }
}

#[test]
fn the_readme_is_short() {
    let lines = read("README.md").lines().count();
    assert!(
        lines <= README_LINES,
        "README.md has {lines} lines, and may have {README_LINES}: move some of it to docs/"
    );
}

#[test]
fn every_page_is_in_the_book() {
    let book = root().join("docs");
    let summary = read("docs/SUMMARY.md");
    let listed: BTreeSet<PathBuf> = links(&summary).map(|target| book.join(target)).collect();
    let mut pages: BTreeSet<PathBuf> = pages().into_iter().collect();
    assert!(pages.remove(&book.join("SUMMARY.md")));
    assert_eq!(listed, pages, "docs/SUMMARY.md lists other pages than there are");
    assert_eq!(links(&summary).count(), listed.len(), "docs/SUMMARY.md lists a page twice");
}

#[test]
fn every_command_has_an_example_and_every_recipe_key_its_place() {
    let texts: Vec<String> = documents().iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
    for command in Cli::command().get_subcommands() {
        let example = format!("\nquantc {}", command.get_name());
        assert!(texts.iter().any(|text| text.contains(&example)), "no example of `quantc {}`", command.get_name());
    }
    let recipes = read("docs/recipes.md");
    let request = serde_json::to_value(quantc::recipe::Request::default()).unwrap();
    for key in request.as_object().unwrap().keys() {
        let found = recipes.contains(&format!("`{key}`")) || recipes.contains(&format!("[[{key}]]"));
        assert!(found, "docs/recipes.md does not say what the key `{key}` is");
    }
}

/// Help of clap as Markdown: characters that Markdown would take for its own are escaped outside of code.
fn prose(help: &str) -> String {
    let mut code = false;
    let mut text = String::new();
    for character in help.chars() {
        code ^= character == '`';
        // An underscore within a word is no mark of emphasis.
        let within = character == '_' && text.ends_with(char::is_alphanumeric);
        if !code && !within && "_*<[]".contains(character) {
            text.push('\\');
        }
        text.push(character);
    }
    text
}

/// One argument of a command, as an entry of a list.
fn argument(argument: &clap::Arg) -> String {
    let takes_values = argument.get_num_args().is_some_and(|range| range.takes_values());
    let named = argument.get_value_names().filter(|_| takes_values).unwrap_or_default();
    let value = named.iter().map(|name| format!("<{name}>")).collect::<Vec<_>>().join(" ");
    let mut names: Vec<String> = argument.get_short().map(|short| format!("`-{short}`")).into_iter().collect();
    match argument.get_long() {
        Some(long) => names.push(format!("`{}`", format!("--{long} {value}").trim_end())),
        None => names.push(format!("`{value}`")),
    }
    let help = argument.get_long_help().or(argument.get_help()).map(ToString::to_string).unwrap_or_default();
    // A default that depends on other flags stands in the help itself, in clap's manner.
    let (help, own) = help.split_once(" [default: ").unwrap_or((&help, ""));
    let mut entry = format!("- {}: {}", names.join(", "), prose(help.trim_end_matches('.')).replace("\n\n", ". "));
    if !own.is_empty() {
        write!(entry, ". Default: {}", prose(own.trim_end_matches(']'))).unwrap();
    }
    let words = |values: Vec<String>| values.iter().map(|v| format!("`{v}`")).collect::<Vec<_>>().join(", ");
    if takes_values {
        let possible: Vec<String> =
            argument.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
        let default: Vec<String> =
            argument.get_default_values().iter().map(|value| value.to_string_lossy().into_owned()).collect();
        if !possible.is_empty() {
            write!(entry, ". One of {}", words(possible)).unwrap();
        }
        if !default.is_empty() {
            write!(entry, ". Default: {}", words(default)).unwrap();
        }
    }
    entry + ".\n"
}

/// docs/reference.md: every command with its arguments and flags, in the words of `--help`.
fn reference() -> String {
    let mut cli = Cli::command();
    cli.build();
    let mut page = "# Commands\n\nThe help of every command, as `quantc COMMAND --help` prints it. This page is made by \
                    `UPDATE_DOCS=1 cargo test --test it readme::the_reference`, and the test fails when it is out of date.\n"
        .to_owned();
    let mut seen: Vec<(String, BTreeSet<String>)> = Vec::new();
    for command in cli.get_subcommands_mut().filter(|command| !command.is_hide_set() && command.get_name() != "help") {
        let name = command.get_name().to_owned();
        let about = command.get_long_about().or(command.get_about()).map(ToString::to_string).unwrap_or_default();
        let usage = command.render_usage().to_string();
        let usage = usage.trim_start_matches("Usage:").trim();
        write!(page, "\n## quantc {name}\n\n{}.\n\n", prose(about.trim_end_matches('.'))).unwrap();
        write!(page, "```text\n$ {usage}\n```\n").unwrap();
        let shown =
            command.get_arguments().filter(|a| !a.is_hide_set() && !["help", "version"].contains(&a.get_id().as_str()));
        let entries: Vec<(String, String)> = shown
            .map(|a| {
                let heading = if a.is_positional() { "Arguments" } else { a.get_help_heading().unwrap_or("Flags") };
                (heading.to_owned(), argument(a))
            })
            .collect();
        let own: BTreeSet<String> = entries.iter().map(|(_, entry)| entry.clone()).collect();
        // A command that takes all that another takes says so, and what it has beside that.
        let other =
            seen.iter().filter(|(_, all)| all.len() > 10 && all.is_subset(&own)).max_by_key(|(_, all)| all.len());
        if let Some((other, _)) = other {
            write!(page, "\nIt takes every argument and flag of [`quantc {other}`](#quantc-{other}), and these:\n")
                .unwrap();
        }
        let mut headings: Vec<&str> = Vec::new();
        for (heading, _) in &entries {
            if !headings.contains(&heading.as_str()) {
                headings.push(heading);
            }
        }
        headings.sort_by_key(|heading| *heading != "Arguments");
        for heading in headings {
            let left = |entry: &String| other.is_none_or(|(_, all)| !all.contains(entry));
            let list: String =
                entries.iter().filter(|(h, e)| h == heading && left(e)).map(|(_, e)| e.as_str()).collect();
            if !list.is_empty() {
                write!(page, "\n**{heading}**\n\n{list}").unwrap();
            }
        }
        if let Some(after) = command.get_after_long_help().or(command.get_after_help()) {
            write!(page, "\n```text\n{}\n```\n", after.to_string().trim_end()).unwrap();
        }
        seen.push((name, own));
    }
    page
}

#[test]
fn the_reference_is_what_help_prints() {
    let path = root().join("docs/reference.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, reference()).unwrap();
        return;
    }
    let found = std::fs::read_to_string(&path).unwrap();
    let renew = "UPDATE_DOCS=1 cargo test --test it readme::the_reference";
    assert!(found == reference(), "docs/reference.md is not what --help prints: {renew}");
}

/// The picture of the README shows the rows of the table in docs/benchmarks.md from which `benches/picture.py` draws it.
#[test]
fn the_picture_shows_the_table() {
    let picture = read("docs/kl.svg");
    let benchmarks = read("docs/benchmarks.md");
    let (_, rest) = benchmarks.split_once("<!-- picture -->").expect("the table's mark");
    let rows =
        rest.lines().skip_while(|line| !line.starts_with("|---")).skip(1).take_while(|line| line.starts_with('|'));
    let mut points = 0;
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let sizes = cells[2].split('/').map(str::trim);
        for ((who, size), kl) in ["llama-quantize", "quantc"].into_iter().zip(sizes).zip([cells[3], cells[4]]) {
            let kl = kl.split(' ').next().unwrap();
            let title = format!("<title>{} by {who}: {size} bytes, KL {kl}</title>", cells[1]);
            assert!(picture.contains(&title), "docs/kl.svg has no `{title}`: python3 benches/picture.py");
            points += 1;
        }
    }
    assert!(points >= 12, "only {points} points");
}
