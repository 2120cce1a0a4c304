//! Parquet files as records: the columns that take part in records, with their lists and structs.

use parquet::basic::{ConvertedType, Repetition};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use super::guard::guarded;
use super::records::Records;
use super::{SampleError, record};

/// Reads a whole file. Fails where it is damaged, has no column that is known, or one whose form is not read.
pub(super) fn read(name: &str, bytes: Vec<u8>) -> Result<Records, SampleError> {
    let bad = |problem: String| SampleError::Unread { name: name.to_owned(), problem };
    let damaged = "a damaged Parquet file: write it again";
    guarded(&None, bytes.len(), damaged, || rows(bytes)).and_then(|records| records).map_err(bad)
}

fn rows(bytes: Vec<u8>) -> Result<Records, String> {
    let file = SerializedFileReader::new(bytes::Bytes::from(bytes)).map_err(damaged)?;
    let metadata = file.metadata().file_metadata();
    let schema = metadata.schema();
    let (known, others): (Vec<_>, Vec<_>) =
        schema.get_fields().iter().cloned().partition(|field| record::is_known(field.name()));
    if !known.iter().any(|field| record::is_content(field.name())) {
        let found: Vec<&str> = known.iter().chain(&others).take(8).map(|field| field.name()).collect();
        return Err(format!(
            "no column `text`, `messages`, or `prompt` and `completion`, …; found `{}`",
            found.join("`, `")
        ));
    }
    if let Some(problem) = record::twice(known.iter().map(|field| field.name())) {
        return Err(problem);
    }
    for field in &known {
        readable(field).map_err(|problem| format!("column `{}`: {problem}", field.name()))?;
    }
    let projection = Type::group_type_builder(schema.name()).with_fields(known).build().map_err(damaged)?;
    let mut records = Records::default();
    // It is not read; that it is there is told.
    let rejected = others.iter().any(|field| field.name() == record::REJECTED);
    for (index, row) in file.get_row_iter(Some(projection)).map_err(damaged)?.enumerate() {
        let row = row.map_err(|error| format!("row {}: {}", index + 1, damaged(error)))?;
        let mut fields: Map<String, Value> =
            row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect();
        if rejected {
            fields.insert(record::REJECTED.to_owned(), true.into());
        }
        records.add(|| format!("row {}", index + 1), Ok(Value::Object(fields)));
    }
    Ok(records)
}

fn damaged(error: ParquetError) -> String {
    let words = match error {
        ParquetError::NYI(words) => {
            return format!(
                "a Parquet file of a kind that is not read ({words}); write it again with compression snappy or zstd"
            );
        }
        ParquetError::General(words) | ParquetError::EOF(words) => words,
        other => other.to_string(),
    };
    let words: String = words.lines().next().unwrap_or_default().chars().take(200).collect();
    format!("a damaged Parquet file, or of a kind that is not read ({words})")
}

/// Refuses a column that the library would read wrongly, or over which it would panic.
fn readable(field: &Type) -> Result<(), String> {
    let info = field.get_basic_info();
    if info.has_repetition() && info.repetition() == Repetition::REPEATED {
        return Err("a repeated field outside of a list, which is not read; write it with lists".to_owned());
    }
    if field.is_primitive() {
        return Ok(());
    }
    let inner = field.get_fields();
    let list = matches!(info.converted_type(), ConvertedType::LIST | ConvertedType::MAP | ConvertedType::MAP_KEY_VALUE);
    match inner {
        [repeated]
            if list
                && repeated.get_basic_info().has_repetition()
                && repeated.get_basic_info().repetition() == Repetition::REPEATED =>
        {
            let inner: &[_] = if repeated.is_primitive() { &[] } else { repeated.get_fields() };
            inner.iter().try_for_each(|field| readable(field))
        }
        _ if list => Err("a list that is not written as the format says".to_owned()),
        inner => inner.iter().try_for_each(|field| readable(field)),
    }
}

/// A struct without its null fields: every one there has every field, whether it was in the record or not.
fn object(row: &Row) -> Value {
    let fields = row.get_column_iter().map(|(name, field)| (name.clone(), value(field)));
    Value::Object(fields.filter(|(_, value)| !value.is_null()).collect::<Map<String, Value>>())
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float16(value) => f64::from(value.to_f32()).into(),
        Field::Float(value) => (*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(text) => text.as_str().into(),
        // Some writers do not mark their strings as such.
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Value::from),
        Field::Group(row) => object(row),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let entries = map.entries().iter().map(|(key, item)| (value(key), value(item)));
            Value::Object(
                entries
                    .filter(|(_, item)| !item.is_null())
                    .map(|(key, item)| (key.as_str().map_or_else(|| key.to_string(), str::to_owned), item))
                    .collect(),
            )
        }
        // Dates, times and decimals take part in no record; as text they do no harm.
        other => other.to_string().into(),
    }
}

#[cfg(test)]
mod tests {
    use parquet::schema::parser::parse_message_type;

    use super::*;

    #[test]
    fn columns_that_the_library_reads_wrongly_are_refused() {
        let check = |column: &str| {
            let schema = parse_message_type(&format!("message m {{ {column} }}")).unwrap();
            readable(&schema.get_fields()[0])
        };
        let turn = "optional group element { optional binary role (UTF8); optional binary content (UTF8); }";
        let list = |inner: &str| format!("optional group messages (LIST) {{ {inner} }}");
        check("optional binary text (UTF8);").unwrap();
        check(&list(&format!("repeated group list {{ {turn} }}"))).unwrap();
        // The older forms of a list.
        check(&list("repeated binary array (UTF8);")).unwrap();
        check(&list("repeated group array { required binary role; required binary content; }")).unwrap();
        check(
            "optional group m (MAP) { repeated group key_value { required binary key (UTF8); optional int32 value; } }",
        )
        .unwrap();
        for bad in [
            "repeated binary text (UTF8);".to_owned(),
            "repeated group messages { required binary role (UTF8); }".to_owned(),
            "optional group row { repeated binary text (UTF8); }".to_owned(),
            list("repeated group list { repeated binary element (UTF8); }"),
            list("optional binary element (UTF8);"),
            list("repeated binary a; repeated binary b;"),
        ] {
            assert!(check(&bad).unwrap_err().contains("list"), "{bad}");
        }
    }
}
