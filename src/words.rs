//! How what others have named appears in what people read.

use std::path::Path;

/// What a file is called, without the folders that it lies in, which are nobody else's business.
pub fn called(path: &str) -> &str {
    let trimmed = path.trim_end_matches(std::path::MAIN_SEPARATOR);
    Path::new(trimmed).file_name().and_then(|name| name.to_str()).unwrap_or(trimmed)
}

/// `text` on one line and without signs that steer a terminal or break a page: names of tensors may hold anything.
pub fn one_line(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_without_places_and_steer_nothing() {
        assert_eq!(called("/somebody/text.jsonl"), "text.jsonl");
        assert_eq!(called("mixed"), "mixed");
        assert_eq!(called("folder/"), "folder");
        assert_eq!(called("/"), "");
        assert_eq!(one_line("a\u{1b}[31m\nb\u{7}ü"), "a\\u{1b}[31m\\nb\\u{7}ü");
    }
}
