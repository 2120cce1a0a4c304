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
}
