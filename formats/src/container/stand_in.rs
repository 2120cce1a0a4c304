//! What is found where a file should be that was never fetched: a pointer, a page, an answer, nothing.

/// The first line of a pointer that git-lfs keeps in place of a large file.
const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Bytes of a file that [`stand_in`] looks at.
pub const LOOKED_AT: usize = 512;

/// What a server says instead of a file, at its beginning.
const ANSWERS: &[&str] = &[
    "Entry not found",
    "Repository not found",
    "Invalid username or password",
    "Invalid credentials",
    "Access to model ",
    "Access denied",
    "404: Not Found",
];

/// Archives and formats of other programs: how their files begin, what they are, and what to do with them.
const OTHERS: &[(&[u8], &str)] = &[
    (b"PK\x03\x04", "a zip archive, as torch.save writes too; unpack it, or save the model as safetensors"),
    (b"\x1f\x8b", "a gzip archive; unpack it with `gunzip`"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it with `unzstd`"),
    (b"\xfd7zXZ\0", "an xz archive; unpack it with `unxz`"),
    (b"BZh", "a bzip2 archive; unpack it with `bunzip2`"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file of Keras; save the model as safetensors"),
    (b"GGUF", "a GGUF file; give it as the model itself"),
    // GGML, GGMF, GGJT and GGLA, as numbers with the least byte first.
    (b"lmgg", OLD),
    (b"fmgg", OLD),
    (b"tjgg", OLD),
    (b"algg", OLD),
];
const OLD: &str = "a file of the formats that llama.cpp had before GGUF; get the model as GGUF or safetensors";

/// Whether a file that begins with `bytes` is a pointer of git-lfs.
pub fn is_pointer(bytes: &[u8]) -> bool {
    bytes.starts_with(POINTER)
}

/// What a file that begins with `bytes` is instead of a file of a model, and what to do; `None` for every other file.
///
/// At least [`LOOKED_AT`] bytes are looked at, where there are so many.
pub fn stand_in(bytes: &[u8]) -> Option<String> {
    let bytes = &bytes[..bytes.len().min(LOOKED_AT)];
    if bytes.is_empty() {
        return Some("the file is empty; fetch it again".into());
    }
    if is_pointer(bytes) {
        return Some("this is a pointer of git-lfs and not the file itself; fetch the file with `git lfs pull`".into());
    }
    let text = String::from_utf8_lossy(bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes));
    let text = text.trim_start();
    let begins = |word: &str| text.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word));
    if begins("<!doctype html") || begins("<html") {
        let why = "this is an HTML page and not the file itself; fetch the file from an address with /resolve/ in it, \
                   not /blob/, and with a token if the model asks for one";
        return Some(why.into());
    }
    let answer = ANSWERS.iter().find(|answer| begins(answer))?;
    let answer = answer.trim_end();
    Some(format!("this is what a server answered (`{answer}`) and not the file itself; fetch the file again"))
}

/// What a file that begins with `bytes` is in place of `expected`, such as "a GGUF file", and what to do: what [`stand_in`] knows,
/// an archive, or a file of another format. `None` for every other file.
pub fn another(bytes: &[u8], expected: &str) -> Option<String> {
    if let Some(why) = stand_in(bytes) {
        return Some(why);
    }
    if let Some((_, what)) = OTHERS.iter().find(|(start, _)| bytes.starts_with(start)) {
        return Some(format!("this is not {expected} but {what}"));
    }
    // The header of an ONNX model: its version, then the name of the program that wrote it.
    let is_onnx = bytes.len() > 4 && bytes[0] == 8 && bytes[1] < 32 && bytes[2] == 0x12 && bytes[3] < 64;
    let why = "looks like an ONNX model; give the checkpoint that it was exported from";
    is_onnx.then(|| format!("this is not {expected} but {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_a_files_place_is_known_by_its_beginning() {
        for (bytes, word) in [
            (&b""[..], "is empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
            (b"\n<!DOCTYPE html>\n<html class=\"\">", "HTML page"),
            (b"\xef\xbb\xbf<HTML>", "HTML page"),
            (b"Entry not found", "`Entry not found`"),
            (b"Access to model meta/x is restricted.", "`Access to model`"),
        ] {
            let told = stand_in(bytes).unwrap();
            assert!(told.contains(word), "{told}");
        }
        for bytes in
            [&b"{\"a\": \"<html>\"}"[..], b"GGUF\x03", b"\x08\0\0\0\0\0\0\0{}", b"\n\x0e\n\x05<unk>", b"versions"]
        {
            assert_eq!(stand_in(bytes), None);
        }
    }

    #[test]
    fn archives_and_other_formats_are_named() {
        for (bytes, told) in [
            (&b"PK\x03\x04\0"[..], "this is not a GGUF file but a zip archive, as torch.save writes too; unpack it"),
            (b"\x1f\x8b\x08\x08", "this is not a GGUF file but a gzip archive; unpack it with `gunzip`"),
            (
                b"tjgg\x01",
                "this is not a GGUF file but a file of the formats that llama.cpp had before GGUF; get the model",
            ),
            (b"\x08\x08\x12\x07pytorch", "this is not a GGUF file but looks like an ONNX model; give the checkpoint"),
            (b"Entry not found", "this is what a server answered (`Entry not found`)"),
        ] {
            let said = another(bytes, "a GGUF file").unwrap();
            assert!(said.starts_with(told), "{said}");
        }
        // A safetensors header of 8, 18 and 2066 bytes.
        for bytes in [&b"\x08\0\0\0\0\0\0\0{}"[..], b"\x12\0\0\0\0\0\0\0{", b"\x12\x08\0\0\0\0\0\0{", b"\0\0\0\0"] {
            assert_eq!(another(bytes, "a model"), None);
        }
    }
}
