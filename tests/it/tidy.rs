//! The project's own rules, kept by a test: which room may use what, how long a file is, where printing belongs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Lines that no file may reach.
const LONGEST: usize = 800;

/// Lines of the longest function, from its name to its closing brace.
const LONGEST_FUNCTION: usize = 100;

/// Each room, the rooms to its left, and what its code may not name.
const ROOMS: &[(&str, &[&str], &[&str])] = &[
    ("formats", &[], &["rayon", "std::thread", "tokenizers::", "anyhow"]),
    ("kernels", &["formats"], &["std::fs", "std::net", "memmap2", "tokenizers::", "serde_json", "anyhow"]),
    (
        "calibration",
        &["formats", "kernels"],
        &["std::fs", "std::net", "memmap2", "kernels::Cpu", "kernels::ops", "anyhow"],
    ),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below `folder` whose name ends in one of `endings`.
fn files(folder: &str, endings: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root().join(folder)];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                open.extend((name != "target" && !name.starts_with('.')).then_some(path));
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Lines of a Rust file before its tests, with their numbers; nothing of a file that is a test altogether.
fn before_tests(path: &Path) -> Vec<(usize, String)> {
    let is_test = ["tests.rs", "golden.rs"].iter().any(|name| path.ends_with(name))
        || path.parent().is_some_and(|p| p.ends_with("tests"));
    let text = if is_test { String::new() } else { read(path) };
    let before_tests = text.lines().enumerate().take_while(|(_, line)| !line.starts_with("mod tests {"));
    let without_helpers = before_tests.take_while(|(_, line)| !line.starts_with("pub(crate) mod testing"));
    without_helpers.map(|(index, line)| (index + 1, line.to_owned())).collect()
}

/// The same without comments.
fn code(path: &Path) -> Vec<(usize, String)> {
    let mut lines = before_tests(path);
    lines.retain(|(_, line)| !line.trim_start().starts_with("//"));
    lines
}

fn sources() -> Vec<PathBuf> {
    ["src", "formats/src", "kernels/src", "calibration/src"].iter().flat_map(|folder| files(folder, &[".rs"])).collect()
}

#[test]
fn rooms_depend_on_the_rooms_to_their_left_only() {
    for (room, left, _) in ROOMS {
        let manifest: toml::Table = read(&root().join(room).join("Cargo.toml")).parse().unwrap();
        let allowed: BTreeSet<String> = left.iter().map(|name| format!("quantc-{name}")).collect();
        for table in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(table) = manifest.get(table).and_then(|t| t.as_table()) else { continue };
            for name in table.keys().filter(|name| name.starts_with("quantc")) {
                assert!(allowed.contains(name), "{room} may not depend on {name}: arrows point to the left only");
            }
        }
    }
}

#[test]
fn the_python_module_knows_the_root_of_the_crate_alone() {
    let manifest: toml::Table = read(&root().join("src/python/Cargo.toml")).parse().unwrap();
    let names = manifest["dependencies"].as_table().unwrap().keys();
    assert_eq!(names.filter(|name| name.starts_with("quantc")).collect::<Vec<_>>(), ["quantc"]);
    for path in files("src/python", &[".rs"]) {
        for (number, line) in code(&path) {
            for (at, _) in line.match_indices("quantc::") {
                for name in rooms_of(&line[at + "quantc::".len()..]) {
                    let inner = root().join("src").join(format!("{name}.rs")).exists();
                    let called = line[at..].starts_with(&format!("quantc::{name}("));
                    assert!(
                        !inner || called,
                        "{}:{number}: `quantc::{name}` is no part of the library",
                        path.display()
                    );
                }
            }
        }
    }
}

/// The floors of `src/` that docs/ARCHITECTURE.md lists, the lowest first: the rooms of each, which are the modules of the crate.
fn floors() -> Vec<Vec<String>> {
    let text = read(&root().join("docs/ARCHITECTURE.md"));
    let (_, section) = text.split_once("\n## Floors of `src/`\n").expect("the section on floors");
    let rows = section.lines().skip_while(|line| !line.starts_with("| `")).take_while(|line| line.starts_with("| `"));
    let rooms = |row: &str| row.split('|').nth(1).unwrap().split('`').skip(1).step_by(2).map(str::to_owned).collect();
    let mut floors: Vec<Vec<String>> = rows.map(rooms).collect();
    floors.reverse();
    floors
}

/// The rooms that a path goes on to, of which `rest` is what follows the root: one, or those of a group in braces.
fn rooms_of(rest: &str) -> Vec<String> {
    let name = |text: &str| {
        let text = text.trim_start();
        text[..text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len())].to_owned()
    };
    let Some(group) = rest.strip_prefix('{') else { return vec![name(rest)] };
    let (mut depth, mut start, mut found) = (0, 0, Vec::new());
    for (index, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                found.push(name(&group[start..index]));
                start = index + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    found.retain(|name| !name.is_empty());
    found
}

/// Every path to a room in a file of `src/`, as far as paths tell: the line, whether the path begins at the root, and the room.
fn imports(path: &Path) -> Vec<(usize, bool, String)> {
    let inside = path.strip_prefix(root().join("src")).unwrap().with_extension("");
    // How many `super::` lead from here to the root of the crate.
    let depth = inside.iter().filter(|part| *part != "mod").count();
    let mut text = String::new();
    let mut lines = Vec::new();
    for (number, line) in code(path) {
        text += line.split(" //").next().unwrap();
        text.push('\n');
        lines.push(number);
    }
    let absolute = if inside == Path::new("main") { "quantc::" } else { "crate::" };
    let mut found = Vec::new();
    for begin in [absolute.to_owned(), "super::".repeat(depth)] {
        for (at, _) in text.match_indices(&begin[..]) {
            if text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            let number = lines[text[..at].matches('\n').count()];
            let rooms = rooms_of(&text[at + begin.len()..]);
            found.extend(rooms.into_iter().map(|room| (number, begin == absolute, room)));
        }
    }
    found
}

#[test]
fn files_import_from_the_floors_below_alone() {
    let floors = floors();
    let of = |room: &str| floors.iter().position(|rooms| rooms.iter().any(|known| known == room));
    let mut rooms = BTreeSet::new();
    let mut seen = 0;
    // The module for Python is a crate of its own.
    for path in files("src", &[".rs"]).into_iter().filter(|path| !path.starts_with(root().join("src/python"))) {
        let inside = path.strip_prefix(root().join("src")).unwrap().with_extension("");
        let own = inside.iter().next().unwrap().to_str().unwrap();
        if own == "lib" {
            continue;
        }
        rooms.insert(own.to_owned());
        let here =
            of(own).unwrap_or_else(|| panic!("{}: `{own}` is on no floor of docs/ARCHITECTURE.md", path.display()));
        for (number, absolute, room) in imports(&path).into_iter().filter(|(.., room)| room != own) {
            let place = format!("{}:{number}", path.display());
            // The program alone takes what the crate offers at its root; elsewhere the room is named that it comes from. What is
            // around a module within a file is no room either.
            let Some(there) = of(&room) else {
                assert!(own == "main" || !absolute, "{place}: `{room}` is no room of docs/ARCHITECTURE.md");
                continue;
            };
            assert!(there < here, "{place}: `{own}` may not import from `{room}`, which is not on a floor below it");
            seen += 1;
        }
    }
    assert!(seen > 300, "only {seen} imports were found");
    let listed: BTreeSet<String> = floors.into_iter().flatten().collect();
    assert_eq!(listed, rooms, "docs/ARCHITECTURE.md lists rooms that are not there");
}

#[test]
fn rooms_do_not_touch_what_belongs_to_others() {
    for (room, _, forbidden) in ROOMS {
        for path in files(&format!("{room}/src"), &[".rs"]) {
            for (number, line) in code(&path) {
                // Compiled kernels are kept on disk.
                let own = path.ends_with("cuda/compile.rs") || path.ends_with("cuda/simulated.rs");
                for word in forbidden.iter().filter(|word| !(own && **word == "std::fs")) {
                    assert!(!line.contains(word), "{}:{number}: `{word}` does not belong in {room}", path.display());
                }
            }
        }
        let manifest = read(&root().join(room).join("Cargo.toml"));
        for word in forbidden.iter().filter(|word| ["rayon", "anyhow", "memmap2"].contains(word)) {
            assert!(!manifest.contains(&format!("{word}.workspace")), "{room} may not depend on {word}");
        }
    }
}

#[test]
fn one_place_picks_the_device_and_one_the_family() {
    for path in sources() {
        let is = |name: &str| path.ends_with(name);
        for (number, line) in code(&path) {
            let place = format!("{}:{number}", path.display());
            assert!(!line.contains("anyhow") || is("src/main.rs"), "{place}: anyhow belongs to main.rs");
            let device = ["&Cpu", "kernels::Cpu", "&Cuda", "kernels::Cuda"].iter().any(|name| line.contains(name));
            let own = path.starts_with(root().join("kernels"));
            assert!(!device || own || is("src/api/compute.rs"), "{place}: the device is picked in api/compute.rs");
            let family =
                line.contains("\"model_type\"") && !line.contains("json!") && path.starts_with(root().join("src"));
            let may = is("src/families/mod.rs") || is("src/inspect.rs") || is("src/dialect/settings/config.rs");
            assert!(!family || may, "{place}: the family is looked up in families/mod.rs");
        }
    }
}

#[test]
fn connections_belong_to_the_hub() {
    let mut seen = 0;
    for path in sources() {
        let is_hub = path.parent().is_some_and(|folder| folder.ends_with("src/hub"));
        for (number, line) in code(&path) {
            let named = ["ureq", "rustls", "std::net"].iter().any(|word| line.contains(word));
            assert!(is_hub || !named, "{}:{number}: connections belong to src/hub", path.display());
            seen += usize::from(named);
        }
    }
    assert!(seen > 0);
}

#[test]
fn printing_belongs_to_the_command_line() {
    // Said in pieces, so that this file does not find itself.
    let words = ["println", "eprintln", "print", "dbg", "todo", "unimplemented"].map(|name| format!("{name}!("));
    for path in sources() {
        let may = path.ends_with("src/main.rs") || path.ends_with("src/demo.rs");
        for (number, line) in code(&path) {
            for word in &words {
                assert!(may || !line.contains(word.as_str()), "{}:{number}: `{word}` here", path.display());
            }
        }
    }
}

#[test]
fn files_are_short_enough_to_be_read() {
    let mut longest = (0, PathBuf::new());
    for path in files(".", &[".rs", ".py", ".cu", ".cuh", ".h", ".cpp"]) {
        let lines = read(&path).lines().count();
        assert!(lines < LONGEST, "{}: {lines} lines; divide it, {LONGEST} is the limit", path.display());
        longest = longest.max((lines, path));
    }
    assert!(longest.0 > 100, "no sources were found");
    eprintln!("the longest file is {}, {} lines", longest.1.display(), longest.0);
}

/// The name of the function that a line begins, and how far the line is indented.
fn function_of(line: &str) -> Option<(&str, &str)> {
    let item = line.trim_start();
    let (before, after) = item.split_once("fn ")?;
    let qualifies = |word: &str| {
        ["const", "async", "unsafe", "extern", "default", "pub"].contains(&word) || word.starts_with(['"', '('])
    };
    let before = before.replace("pub(", "pub (");
    let name = &after[..after.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(after.len())];
    (before.split_whitespace().all(qualifies) && !name.is_empty()).then(|| (name, &line[..line.len() - item.len()]))
}

/// The functions with a body in lines of code: the number of the line that each begins on, its name, and how many lines it takes.
///
/// The formatter puts the brace that closes a function as far from the margin as the function begins.
fn functions(lines: &[(usize, String)]) -> Vec<(usize, &str, usize)> {
    let mut found = Vec::new();
    for (index, (number, line)) in lines.iter().enumerate() {
        let Some((name, margin)) = function_of(line) else { continue };
        let outside = |line: &str| line.strip_prefix(margin).is_some_and(|rest| !rest.starts_with(' '));
        let mut rest = lines[index..].iter().map(|(_, line)| line.as_str()).enumerate();
        let signature = rest.find(|(_, line)| outside(line) && line.ends_with(['{', '}', ';']));
        let length = match signature {
            Some((_, line)) if line.ends_with('{') => {
                let (last, _) = rest.find(|(_, line)| line.strip_prefix(margin) == Some("}")).expect("a closing brace");
                last + 1
            }
            Some((last, line)) if line.ends_with('}') => last + 1,
            _ => continue,
        };
        found.push((*number, name, length));
    }
    found
}

#[test]
fn functions_are_short_enough_to_be_read() {
    let (mut long, mut seen) = (Vec::new(), 0);
    for path in sources() {
        let lines = before_tests(&path);
        for (number, name, length) in functions(&lines) {
            seen += 1;
            if length > LONGEST_FUNCTION {
                long.push(format!("{}:{number}: `{name}` has {length} lines", path.display()));
            }
        }
    }
    assert!(seen > 2500, "only {seen} functions were found");
    assert!(long.is_empty(), "divide what is longer than {LONGEST_FUNCTION} lines:\n{}", long.join("\n"));
}

#[test]
fn functions_are_told_from_what_only_looks_like_them() {
    let text = "impl A {\n    fn none(&self);\n    fn wide(\n        a: u8,\n    ) -> u8;\n    pub(super) unsafe fn short() {}\n    \
                pub const fn long(\n        a: u8,\n    ) -> u8\n    where\n        A: B,\n    {\n        if a > 1 {\n        }\n        \
                // fn comment\n        let of: fn (u8) -> u8 = f;\n    }\n}\nfn last() {\n}\n";
    let lines: Vec<(usize, String)> = text.lines().enumerate().map(|(i, line)| (i + 1, line.to_owned())).collect();
    assert_eq!(functions(&lines), [(6, "short", 1), (7, "long", 11), (19, "last", 2)]);
}

#[test]
fn nothing_names_a_place_on_one_machine() {
    let places: Vec<String> = ["work", "root", "home/", "Users", "mnt"].map(|name| format!("/{name}")).to_vec();
    let temporary = format!("/{}/", "tmp");
    for path in files(".", &[".rs", ".py", ".toml", ".md", ".txt"]) {
        // Texts to read, not files of the project.
        if path.parent().is_some_and(|p| p.ends_with("demo") || p.ends_with("presets")) && path.ends_with("mixed.txt")
            || path.ends_with("calibration.txt")
            || path.ends_with("evaluation.txt")
        {
            continue;
        }
        for (index, line) in read(&path).lines().enumerate() {
            let starts = |place: &String| {
                line.match_indices(place.as_str()).any(|(at, _)| {
                    let before = line[..at].chars().next_back();
                    let after = line[at + place.len()..].chars().next();
                    before.is_none_or(|c| " \"'`(=".contains(c))
                        && after.is_none_or(|c| place.ends_with('/') || c == '/')
                })
            };
            let found = places.iter().chain([&temporary]).find(|place| starts(place));
            assert!(found.is_none(), "{}:{}: {line}", path.display(), index + 1);
        }
    }
}

/// Every row of docs/reliability.md names a test that is there.
#[test]
fn what_reliability_promises_is_tested() {
    let text = std::fs::read_to_string(root().join("docs/reliability.md")).unwrap();
    let all = sources().into_iter().chain(files("tests/it", &[".rs"]));
    let code: String = all.map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| fault")).collect();
    assert!(rows.len() > 15);
    for row in rows {
        let named = row.rsplit('|').nth(1).unwrap().split('`').skip(1).step_by(2);
        let tests: Vec<&str> = named.map(|path| path.rsplit("::").next().unwrap()).collect();
        assert!(!tests.is_empty(), "{row}");
        for test in tests {
            assert!(test == "tests" || code.contains(&format!("fn {test}(")), "no test `{test}`: {row}");
        }
    }
}
