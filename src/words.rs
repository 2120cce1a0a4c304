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

/// Prints a line to standard error, as far as anybody listens there.
pub fn tell(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{}", one_line(line));
}

#[cfg(test)]
mod tests {
    use super::*;

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
