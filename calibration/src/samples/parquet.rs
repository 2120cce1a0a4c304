//! Parquet files as records: the columns that take part in records, with their lists and structs.

use parquet::basic::{ConvertedType, Repetition};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::{Type, TypePtr};
use serde_json::{Map, Value};

use super::guard::guarded;
use super::records::Records;
use super::{SampleError, media, record};

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
    // Of images and the like it matters whether they are there; their bytes are the most of a file.
    let media = others.iter().filter(|field| media::is_media(field.name()) && readable(field).is_ok());
    let media = media.map(without_bytes).collect::<Result<Vec<_>, _>>().map_err(damaged)?;
    let fields = known.into_iter().chain(media).collect();
    let projection = Type::group_type_builder(schema.name()).with_fields(fields).build().map_err(damaged)?;
    let mut records = Records::default();
    // It is not read; that it is there is told.
    let rejected = others.iter().any(|field| field.name() == record::REJECTED);
    for (index, row) in file.get_row_iter(Some(projection)).map_err(damaged)?.enumerate() {
        let row = row.map_err(|error| format!("row {}: {}", index + 1, damaged(error)))?;
        let mut fields: Map<String, Value> =
            row.get_column_iter().map(|(name, field)| (name.clone(), of_column(name, field))).collect();
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

/// A column of images without the fields of their structs that hold them, as long as there are others.
fn without_bytes(field: &TypePtr) -> Result<TypePtr, ParquetError> {
    if field.is_primitive() {
        return Ok(field.clone());
    }
    let is_bytes = |inner: &TypePtr| inner.name() == "bytes" && inner.is_primitive();
    let all = field.get_fields();
    let kept = if all.iter().all(is_bytes) {
        all.to_vec()
    } else {
        all.iter().filter(|inner| !is_bytes(inner)).cloned().collect()
    };
    let kept = kept.iter().map(without_bytes).collect::<Result<Vec<_>, _>>()?;
    let info = field.get_basic_info();
    let mut builder = Type::group_type_builder(field.name())
        .with_converted_type(info.converted_type())
        .with_logical_type(info.logical_type_ref().cloned())
        .with_id(info.has_id().then(|| info.id()))
        .with_fields(kept);
    if info.has_repetition() {
        builder = builder.with_repetition(info.repetition());
    }
    Ok(builder.build()?.into())
}

/// The value of a column; of one with images whether there are any.
fn of_column(name: &str, field: &Field) -> Value {
    match field {
        _ if !media::is_media(name) => value(field),
        Field::Null => Value::Null,
        Field::ListInternal(list) => (!list.elements().is_empty()).into(),
        Field::Str(text) => text.as_str().into(),
        _ => true.into(),
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

    /// As datasets stores images: a struct of bytes and a path, alone or in a list.
    #[test]
    fn images_are_counted_without_being_read() {
        use parquet::data_type::{ByteArray, ByteArrayType};
        use parquet::file::properties::WriterProperties;
        use parquet::file::writer::SerializedFileWriter;

        let schema = "message m { required binary text (UTF8); optional group image { optional binary bytes; optional binary path (UTF8); }
            optional group images (LIST) { repeated group list { optional group element { optional binary bytes; optional binary path (UTF8); } } } }";
        let schema = std::sync::Arc::new(parse_message_type(schema).unwrap());
        let mut bytes = Vec::new();
        let mut writer =
            SerializedFileWriter::new(&mut bytes, schema, std::sync::Arc::new(WriterProperties::default())).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let texts = ["<image>\nA", "B", "C <image>"].map(ByteArray::from);
        let picture = [ByteArray::from(vec![0xff, 0xfe])];
        // One image with bytes and no path; none; a list of one.
        let columns: [(&[ByteArray], &[i16], &[i16]); 5] = [
            (&texts, &[], &[]),
            (&picture, &[2, 0, 0], &[]),
            (&[], &[1, 0, 0], &[]),
            (&picture, &[0, 1, 4], &[0, 0, 0]),
            (&[], &[0, 1, 3], &[0, 0, 0]),
        ];
        for (values, definitions, repetitions) in columns {
            let mut column = group.next_column().unwrap().unwrap();
            let definitions = (!definitions.is_empty()).then_some(definitions);
            let repetitions = (!repetitions.is_empty()).then_some(repetitions);
            column.typed::<ByteArrayType>().write_batch(values, definitions, repetitions).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
        let found = super::super::read("a.parquet", bytes).unwrap();
        let plain = |text: &str| super::super::Document::Plain(text.to_owned());
        assert_eq!(found.documents, ["A", "B", "C "].map(plain));
        let note = "2 of 3 records of a.parquet name images, videos or audio under `image` and `images`, which are not looked at, and `<image>` \
                    was left out of the text, where it stands for one of them; the first is row 1";
        assert_eq!(found.notes, [note]);
    }

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
