//! The report as one page that needs nothing but a browser.

use super::Compared;
use crate::error::{Error, Result};

/// The page, into which the table goes as JSON.
const PAGE: &str = include_str!("page.html");

/// Where it goes.
const PLACE: &str = "{\"the table\": \"goes here\"}";

/// The page of a table. Whatever models and texts hold, it ends no script and no comment of the page.
pub fn page(table: &Compared) -> Result<String> {
    let json = serde_json::to_string(table).map_err(|e| Error::failed(e.to_string()))?;
    Ok(PAGE.replacen(PLACE, &harmless(&json), 1))
}

/// JSON that means the same and holds nothing that HTML or JavaScript would stumble over.
fn harmless(json: &str) -> String {
    // These signs stand in strings only.
    let coded = |c: char| matches!(c, '<' | '>' | '&' | '\u{2028}' | '\u{2029}' | '\u{7f}'..='\u{9f}' | '\u{feff}');
    json.chars().map(|c| if coded(c) { format!("\\u{:04x}", u32::from(c)) } else { c.to_string() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_ends_the_script() {
        let json = serde_json::to_string("</script><!-- & \u{2028} é").unwrap();
        let safe = harmless(&json);
        assert!(!safe.contains(['<', '>', '&', '\u{2028}']) && safe.contains('é'), "{safe}");
        assert_eq!(serde_json::from_str::<String>(&safe).unwrap(), "</script><!-- & \u{2028} é");
        assert_eq!(PAGE.matches(PLACE).count(), 1);
        for remote in ["http://", "https://", "src=", "@import", "innerHTML"] {
            assert!(!PAGE.replace("http://www.w3.org/2000/svg", "").contains(remote), "{remote}");
        }
    }
}
