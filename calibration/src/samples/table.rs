//! Tables of delimited text, `.csv` and `.tsv`, as records: the header names the fields.

use serde_json::{Map, Value};

use super::records::Records;
use super::{SampleError, record};

/// What divides the columns: by the ending of the name, and for `.csv` by what gives the header columns that are known.
///
/// `None` where the name does not say that the file is a table.
pub(super) fn delimiter(ending: &str, content: &str) -> Option<u8> {
    match ending {
        "tsv" | "tab" => Some(b'\t'),
        "csv" => {
            let known = |delimiter: &u8| {
                let header = rows(content, *delimiter).into_records().next();
                header
                    .and_then(Result::ok)
                    .is_some_and(|header| header.iter().any(|name| record::is_content(name.trim())))
            };
            Some([b',', b';', b'\t', b'|'].into_iter().find(known).unwrap_or(b','))
        }
        _ => None,
    }
}

/// The names in a header of this delimiter.
pub(super) fn header(line: &str, delimiter: u8) -> Option<Vec<String>> {
    let header = rows(line, delimiter).into_records().next()?.ok()?;
    Some(header.iter().map(|name| name.trim().to_owned()).collect())
}

/// How many rows there are below the header, and how many of them have not `columns` fields.
pub(super) fn lengths(content: &str, delimiter: u8, columns: usize) -> (usize, usize) {
    let rows = rows(content, delimiter).into_records().skip(1);
    rows.fold((0, 0), |(all, odd), row| (all + 1, odd + usize::from(!row.is_ok_and(|row| row.len() == columns))))
}

/// Whether a quoted field is never closed.
pub(super) fn is_open(content: &str, delimiter: u8) -> bool {
    open_quote(content.as_bytes(), delimiter).is_some()
}

fn rows(content: &str, delimiter: u8) -> csv::Reader<&[u8]> {
    csv::ReaderBuilder::new().has_headers(false).flexible(true).delimiter(delimiter).from_reader(content.as_bytes())
}

/// Reads a table. Fails where the header names no field that is known, or a quote is never closed.
pub(super) fn read(name: &str, content: &str, delimiter: u8) -> Result<Records, SampleError> {
    let bad = |place: String, problem: String| SampleError::Record { name: name.to_owned(), place, problem };
    if let Some(line) = open_quote(content.as_bytes(), delimiter) {
        return Err(bad(format!("line {line}"), "a quote that is never closed opens here".to_owned()));
    }
    let mut rows = rows(content, delimiter).into_records();
    let header = match rows.next() {
        Some(Ok(header)) => header,
        Some(Err(error)) => return Err(bad("line 1".to_owned(), error.to_string())),
        None => return Err(SampleError::Empty { name: name.to_owned() }),
    };
    let columns: Vec<&str> = header.iter().map(str::trim).collect();
    if !columns.iter().any(|column| record::is_content(column)) {
        let found = columns.iter().take(8).copied().collect::<Vec<_>>().join("`, `");
        return Err(bad(
            "line 1".to_owned(),
            format!("the header must name a column `text`, or `prompt` and `completion`, …; found `{found}`"),
        ));
    }
    if let Some(problem) = record::twice(columns.iter().copied()) {
        return Err(bad("line 1".to_owned(), problem));
    }
    let mut records = Records::default();
    for row in rows {
        let (line, row) = match row {
            Ok(row) => (row.position().map_or(0, csv::Position::line), Ok(row)),
            Err(error) => (error.position().map_or(0, csv::Position::line), Err(error.to_string())),
        };
        let record = row.and_then(|row| {
            if row.len() != columns.len() {
                return Err(format!("a row of {} fields, where the header has {}", row.len(), columns.len()));
            }
            let fields: Map<String, Value> = columns
                .iter()
                .zip(row.iter())
                .filter(|(column, _)| record::is_told(column))
                // An empty cell is how a table says null; of a text it is an empty line.
                .map(|(column, field)| match field.is_empty() && *column != "text" {
                    true => ((*column).to_owned(), Value::Null),
                    false => ((*column).to_owned(), field.into()),
                })
                .collect();
            Ok(Value::Object(fields))
        });
        records.add(|| format!("line {line}"), record);
    }
    Ok(records)
}

/// The line on which a quoted field begins that does not end before the file does.
fn open_quote(content: &[u8], delimiter: u8) -> Option<usize> {
    /// Where in a field the next byte stands.
    enum At {
        Start,
        Plain,
        /// Inside of quotes that were opened on this line.
        Quoted(usize),
        /// After a quote inside of quotes: a second one goes on with the field.
        Closed(usize),
    }
    let (mut line, mut at) = (1, At::Start);
    for &byte in content {
        at = match (at, byte) {
            (At::Start, b'"') => At::Quoted(line),
            (At::Quoted(opened), b'"') => At::Closed(opened),
            (At::Closed(opened), b'"') | (At::Quoted(opened), _) => At::Quoted(opened),
            (_, b'\n' | b'\r') => At::Start,
            (_, byte) if byte == delimiter => At::Start,
            _ => At::Plain,
        };
        line += usize::from(byte == b'\n');
    }
    match at {
        At::Quoted(opened) => Some(opened),
        _ => None,
    }
}
