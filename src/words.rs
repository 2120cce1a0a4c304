//! How what others have named appears in what people read.

use std::path::Path;

/// What a file is called, without the folders that it lies in, which are nobody else's business.
pub fn called(path: &str) -> &str {
    let trimmed = path.trim_end_matches(std::path::MAIN_SEPARATOR);
    Path::new(trimmed).file_name().and_then(|name| name.to_str()).unwrap_or(trimmed)
}

/// Letters of a line that is told; what a file says of itself may have millions.
const LONGEST_LINE: usize = 4096;

/// `text` on one line and without signs that steer a terminal or break a page: names of tensors may hold anything. The middle of a very
/// long one is left out.
pub fn one_line(text: &str) -> String {
    // Marks that turn the direction of writing, or that nobody sees.
    let hidden =
        |c: char| matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    let shown = |c: char| if c.is_control() || hidden(c) { c.escape_default().collect() } else { vec![c] };
    let count = text.chars().count();
    if count <= LONGEST_LINE {
        return text.chars().flat_map(shown).collect();
    }
    let half = LONGEST_LINE / 2;
    let start = text.chars().take(half).flat_map(shown);
    let end = text.chars().skip(count - half).flat_map(shown);
    start.chain(format!(" [{} letters] ", count - 2 * half).chars()).chain(end).collect()
}

/// The first few of some names.
pub fn listed(names: &[&str]) -> String {
    let first: Vec<String> = names.iter().take(3).map(|name| format!("`{name}`")).collect();
    match names.len() {
        0..=3 => first.join(", "),
        all => format!("{} and {} more", first.join(", "), all - 3),
    }
}

/// At most about `most` of some notes: of those that differ only in names and numbers the first, and how many more there are like it. `all`
/// says where all of them are.
pub fn shortened(notes: &[String], most: usize, all: &str) -> Vec<String> {
    if notes.len() <= most {
        return notes.to_vec();
    }
    let mut kinds: Vec<(String, &str, usize)> = Vec::new();
    for note in notes {
        let kind = kind(note);
        match kinds.iter_mut().find(|(known, ..)| *known == kind) {
            Some((.., count)) => *count += 1,
            None => kinds.push((kind, note, 1)),
        }
    }
    let shown = if kinds.len() > most { most - 1 } else { kinds.len() };
    let mut lines: Vec<String> = kinds[..shown]
        .iter()
        .map(|(_, note, count)| match count {
            1 => (*note).to_owned(),
            _ => format!("{note} … and {} more like it; {all}", count - 1),
        })
        .collect();
    let left: usize = kinds[shown..].iter().map(|(.., count)| count).sum();
    lines.extend((left > 0).then(|| format!("… and {left} more; {all}")));
    lines
}

/// A note without what it names: what stands between backquotes, paths, and numbers.
fn kind(note: &str) -> String {
    let unquoted: Vec<&str> = note.split('`').step_by(2).collect();
    let word = |word: &str| -> String {
        let named = word.contains(['/', '_']) || word.contains('.') && !word.ends_with('.');
        if named { String::new() } else { word.chars().filter(|c| !c.is_ascii_digit()).collect() }
    };
    unquoted.join(" ").split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

/// The one name of `known` that somebody who wrote `name` may have meant: equal but for case and for what stands between letters, or else
/// the only one that is nearest by one letter, by two where there are more than four; `None` where there is none, or more than one.
pub fn nearest<'n>(name: &str, known: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let plain = |text: &str| -> Vec<char> {
        text.chars().filter(|c| !"_-. ".contains(*c)).flat_map(char::to_lowercase).take(64).collect()
    };
    let name = plain(name);
    let most = if name.len() > 4 { 2 } else { 1 };
    let mut found: Vec<(usize, &str)> = known.map(|known| (edits(&name, &plain(known)), known)).collect();
    found.sort_by_key(|(edits, _)| *edits);
    match &found[..] {
        [(edits, _), (next, _), ..] if edits == next => None,
        [(edits, known), ..] if *edits <= most && *edits < name.len() => Some(known),
        _ => None,
    }
}

/// How many letters have to be put in, left out, changed, or changed for the one beside them to make one word of another.
fn edits(a: &[char], b: &[char]) -> usize {
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, j) in (0..=a.len()).flat_map(|i| (0..=b.len()).map(move |j| (i, j))) {
        rows[i][j] = match (i, j) {
            (0, n) | (n, 0) => n,
            _ => {
                let changed = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let least = changed.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
                match i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    true => least.min(rows[i - 2][j - 2] + 1),
                    false => least,
                }
            }
        };
    }
    rows[a.len()][b.len()]
}

/// Rows of cells as lines of aligned columns, two spaces apart: the first `left` columns begin where they begin, the others end where they
/// end. Cells are on one line each; the rows are equally long.
pub fn table(rows: &[Vec<String>], left: usize) -> String {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| one_line(cell)).collect()).collect();
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column < left {
            true => format!("{cell:<width$}"),
            false => format!("{cell:>width$}"),
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// The name of a tensor or module with stars for the numbers in it: `model.layers.*.mlp`.
pub fn starred(name: &str) -> String {
    let is_number = |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_digit());
    let parts: Vec<&str> = name.split('.').map(|part| if is_number(part) { "*" } else { part }).collect();
    parts.join(".")
}

/// Indented lines of names, how often each comes where that is more than once, and what is said of them, in columns.
pub fn counted(all: &[(String, String, usize)]) -> String {
    let width = all.iter().map(|(name, ..)| name.chars().count()).max().unwrap_or(0);
    let line = |(name, said, count): &(String, String, usize)| {
        let times = if *count > 1 { format!("{count} × ") } else { String::new() };
        format!("  {times:>8}{:<width$}  {said}\n", one_line(name))
    };
    all.iter().map(line).collect()
}

/// Prints a line to standard error, as far as anybody listens there.
pub fn tell(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{}", one_line(line));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_found_where_there_is_one() {
        let of = |name| nearest(name, ["rtn", "awq", "gptq", "awq+gptq", "Q4_K_M", "Q4_K_S"].into_iter());
        assert_eq!(
            [of("gtpq"), of("GPTQ"), of("gptqq"), of("awq_gptq")],
            [Some("gptq"), Some("gptq"), Some("gptq"), Some("awq+gptq")]
        );
        assert_eq!(
            [of("q4km"), of("Q4-K-M"), of("Q4_K"), of("magic"), of(""), of("a")],
            [Some("Q4_K_M"), Some("Q4_K_M"), None, None, None, None]
        );
    }

    #[test]
    fn notes_that_are_alike_are_told_once() {
        let of = |from: usize, to: usize| (from..to).map(|n| format!("tensor `a.{n}`: {n} values are lost")).collect();
        let few: Vec<String> = of(0, 12);
        assert_eq!(shortened(&few, 12, "x"), few);
        let mut many: Vec<String> = of(0, 38);
        many.push("the model is old".to_owned());
        let shown = shortened(&many, 12, "all are in report.json");
        let first = "tensor `a.0`: 0 values are lost … and 37 more like it; all are in report.json";
        assert_eq!(shown, [first, "the model is old"]);
        let words = ["one", "two", "three", "four", "five"].map(str::to_owned);
        assert_eq!(shortened(&words, 3, "x"), ["one", "two", "… and 3 more; x"]);
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [["model", "KL"], ["a", "0.5"], ["größer", "10.25"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(table(&rows, 1), "model      KL\na         0.5\ngrößer  10.25\n");
        assert_eq!(table(&rows, 2), "model   KL\na       0.5\ngrößer  10.25\n");
        assert_eq!(table(&[], 1), "");
    }

    #[test]
    fn names_are_without_places_and_steer_nothing() {
        assert_eq!(called("/somebody/text.jsonl"), "text.jsonl");
        assert_eq!(called("mixed"), "mixed");
        assert_eq!(called("folder/"), "folder");
        assert_eq!(called("/"), "");
        assert_eq!(one_line("a\u{1b}[31m\nb\u{7}ü"), "a\\u{1b}[31m\\nb\\u{7}ü");
        assert_eq!(one_line("a\u{202e}b"), "a\\u{202e}b");
        let long = one_line(&format!("error: {}: fetch it", "9".repeat(10_000_000)));
        assert!(long.len() < 5000 && long.starts_with("error: 999") && long.ends_with("999: fetch it"));
    }
}
