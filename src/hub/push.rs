//! Files to a repository of a hub: it is asked how it wants each file, large ones are uploaded, and one commit names them all.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::client::{Client, Fault, Sent, header};
use super::listing;
use super::settings::Settings;
use crate::checkpoint::{HubName, INDEX, parts_of};
use crate::error::{Error, Result};
use crate::output::hashing::hash_file;
use crate::progress::Progress;
use crate::report::{PAPERS, papers_of, projector_beside};

/// Files that the hub is asked about at a time.
const AT_ONCE: usize = 256;

/// Bytes from a file's beginning by which the hub tells texts from other files.
const SAMPLE: u64 = 512;

/// What is uploaded as git keeps it, at most: with more the hub is asked to take it as a large file, or refuses it.
const LARGEST_REGULAR: u64 = 10 << 20;

/// What a hub shows as a repository's page.
const CARD: &str = PAPERS[1];

/// A repository that outputs go to.
pub struct Push {
    client: Client,
    endpoint: String,
    id: String,
    private: bool,
}

/// A file that goes along.
struct Going {
    /// Where it is.
    place: PathBuf,
    /// What it is called in the repository.
    path: String,
    bytes: u64,
    /// Its SHA-256, once it is known; only large files need one.
    sha256: String,
    /// It goes as a large file, and the commit names its hash.
    large: bool,
}

impl Push {
    /// Finds out, before any work, whether something can be pushed to `id`: a name, a token that the hub knows and that may write.
    ///
    /// Fails with exit code 2 for what will not change by itself.
    pub fn new(id: &str, private: bool) -> Result<Push> {
        if HubName::parse(id).is_none_or(|name| name.revision.is_some() || name.file.is_some() || name.id != id) {
            return Err(Error::usage(format!("`{id}` is no repository that can be pushed to: say ORG/NAME")));
        }
        let settings = Settings::of_environment()?;
        let Settings { endpoint, offline, token, .. } = &settings;
        if let Some(variable) = offline {
            return Err(Error::usage(format!(
                "nothing can be pushed to {id}, as {variable} forbids the network; unset it"
            )));
        }
        let tokens = format!("{endpoint}/settings/tokens");
        if token.is_none() {
            return Err(Error::usage(format!(
                "pushing to {id} needs a token that may write: make one at {tokens} and set HF_TOKEN to it, or log in with `hf auth login`"
            )));
        }
        let client = Client::new(&settings);
        let who = match client.json("GET", &client.at("/api/whoami-v2"), None) {
            Ok((who, _)) => who,
            Err(Fault::Status { status: 401 | 403, .. }) => {
                return Err(Error::usage(format!(
                    "the hub does not know your token, so that nothing can be pushed to {id}: take a valid one from {tokens}"
                )));
            }
            Err(fault) => return Err(client.told(fault, &format!("asking who may push to {id}"), id)),
        };
        if who["auth"]["accessToken"]["role"] == "read" {
            return Err(Error::usage(format!(
                "your token may only read, and pushing to {id} writes: make one that may at {tokens}"
            )));
        }
        Ok(Push { client, endpoint: endpoint.clone(), id: id.to_owned(), private })
    }

    /// The command that pushes an output to this repository.
    pub fn command(&self, output: &Path) -> String {
        format!("`quantc push {} {}{}`", output.display(), self.id, if self.private { " --private" } else { "" })
    }

    /// Uploads outputs, each a folder or a file, and makes one commit of them; its address.
    ///
    /// The repository is made where there is none. Weights of an earlier push that these do not have are removed, where a folder is pushed.
    pub fn push(&self, outputs: &[PathBuf], message: &str, progress: &mut Progress) -> Result<String> {
        let mut files = Vec::new();
        for output in outputs {
            files.extend(going(output)?);
        }
        let told = |fault: Fault| self.client.told(fault, &format!("pushing to {}", self.id), &self.id);
        self.create().map_err(told)?;
        let there = self.there().map_err(told)?;
        let stale = match outputs.iter().any(|output| output.is_dir()) {
            true => stale(&there, &files),
            false => Vec::new(),
        };
        if let Some(card) = front_page(&there, &files) {
            files.push(card);
        }
        for part in files.chunks_mut(AT_ONCE) {
            self.ask(part).map_err(told)?;
        }
        let bytes = files.iter().filter(|file| file.large).map(|file| file.bytes).sum();
        progress.say(&format!(
            "pushing {} files ({:.1} MB) to {}/{}",
            files.len(),
            bytes as f64 / 1e6,
            self.endpoint,
            self.id
        ));
        if !stale.is_empty() {
            progress.say(&format!("the commit removes weights of an earlier one: {}", stale.join(", ")));
        }
        progress.start(format!("pushing to {}", self.id), bytes)?;
        for file in files.iter_mut().filter(|file| file.large) {
            file.sha256 = hash_file(&file.place)?.sha256;
        }
        let large: Vec<&Going> = files.iter().filter(|file| file.large).collect();
        for part in large.chunks(AT_ONCE) {
            self.upload(part, progress).map_err(told)?;
        }
        self.commit(&files, &stale, message).map_err(told)
    }

    /// Makes the repository where there is none.
    ///
    /// Fails where it was to be private and is public.
    fn create(&self) -> Result<(), Fault> {
        let (owner, name) = self.id.split_once('/').expect("a name in two parts");
        let mut asked = json!({"name": name, "organization": owner, "type": "model"});
        if self.private {
            asked["visibility"] = "private".into();
        }
        match self.client.json("POST", &self.client.at("/api/repos/create"), Some(&asked)) {
            Ok(_) | Err(Fault::Status { status: 409, .. }) => {}
            Err(fault) => return Err(fault),
        }
        if self.private {
            let (info, _) = self.client.json("GET", &self.client.at(&format!("/api/models/{}", self.id)), None)?;
            if info["private"] != true {
                let why = format!(
                    "{} is public, and was to be private; nothing was uploaded: change it in its settings, or push without --push-private",
                    self.id
                );
                return Err(Fault::Other(Error::failed(why)));
            }
        }
        Ok(())
    }

    /// The paths of the files that the repository has.
    fn there(&self) -> Result<Vec<String>, Fault> {
        match listing::files_of(&self.client, &self.id, "main") {
            Ok(there) => Ok(there.into_iter().map(|file| file.path).collect()),
            // A new repository may have no branch yet.
            Err(Fault::Status { status: 404, .. }) => Ok(Vec::new()),
            Err(fault) => Err(fault),
        }
    }

    /// Asks which files go as large ones.
    fn ask(&self, files: &mut [Going]) -> Result<(), Fault> {
        let mut asked = Vec::new();
        for file in files.iter() {
            let mut sample = Vec::new();
            let read = File::open(&file.place).and_then(|open| open.take(SAMPLE).read_to_end(&mut sample));
            read.map_err(Error::io(&file.place, "read"))?;
            asked.push(json!({"path": file.path, "size": file.bytes, "sample": STANDARD.encode(sample)}));
        }
        let url = self.client.at(&format!("/api/models/{}/preupload/main", self.id));
        let (answer, _) = self.client.json("POST", &url, Some(&json!({"files": asked})))?;
        for told in answer["files"].as_array().into_iter().flatten() {
            let file = files.iter_mut().find(|file| told["path"] == file.path.as_str());
            // Empty files are none that can be uploaded.
            if let Some(file) = file {
                file.large = told["uploadMode"] == "lfs" && file.bytes > 0;
            }
        }
        Ok(())
    }

    /// Uploads large files that the hub does not have.
    fn upload(&self, files: &[&Going], progress: &Progress) -> Result<(), Fault> {
        let objects: Vec<Value> = files.iter().map(|file| json!({"oid": file.sha256, "size": file.bytes})).collect();
        let asked = json!({
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": objects,
            "hash_algo": "sha256",
            "ref": {"name": "main"},
        });
        let url = self.client.at(&format!("/{}.git/info/lfs/objects/batch", self.id));
        let answer =
            self.client.patiently(|| self.client.json_once("POST", &url, Some((LFS, asked.to_string().into_bytes()))));
        let (answer, _) = answer?;
        for object in answer["objects"].as_array().into_iter().flatten() {
            let Some(file) = files.iter().find(|file| object["oid"] == file.sha256.as_str()) else { continue };
            if let Some(why) = object["error"]["message"].as_str() {
                return Err(Fault::Other(Error::failed(format!("{}: the hub does not take it: {why}", file.path))));
            }
            match &object["actions"]["upload"] {
                Value::Null => progress.skip(file.bytes),
                action => self.put(file, action, progress)?,
            }
            if let Some(href) = object["actions"]["verify"]["href"].as_str() {
                let told = json!({"oid": file.sha256, "size": file.bytes});
                self.done("POST", &self.client.as_mirrored(href), Some(&told))?;
            }
        }
        Ok(())
    }

    /// Asks for something of which the answer says nothing.
    fn done(&self, method: &str, url: &str, body: Option<&Value>) -> Result<(), Fault> {
        let bytes = body.map(|body| body.to_string().into_bytes());
        self.client.patiently(|| {
            let sent = bytes.as_ref().map_or(Sent::Nothing, |bytes| Sent::Bytes(LFS, bytes));
            self.client.send(method, url, &[("accept", LFS)], sent).map(drop)
        })
    }

    /// Uploads a file as the hub says: as a whole, or in parts that it then puts together.
    fn put(&self, file: &Going, action: &Value, progress: &Progress) -> Result<(), Fault> {
        let strange = || {
            Fault::Other(Error::failed(format!(
                "{}: the hub's answer does not say where to upload it; try again later",
                file.path
            )))
        };
        let url = self.client.as_mirrored(action["href"].as_str().ok_or_else(strange)?);
        let number = |value: &Value| value.as_u64().or_else(|| value.as_str()?.parse().ok());
        let Some(size) = number(&action["header"]["chunk_size"]).filter(|size| *size > 0) else {
            return self.part(file, &url, 0, file.bytes, progress).map(drop);
        };
        let mut parts: Vec<(u64, String)> = Vec::new();
        for (name, value) in action["header"].as_object().into_iter().flatten() {
            if let (Ok(number), Some(url)) = (name.parse(), value.as_str()) {
                parts.push((number, self.client.as_mirrored(url)));
            }
        }
        parts.sort();
        if parts.len() as u64 != file.bytes.div_ceil(size) {
            return Err(strange());
        }
        let mut done = Vec::new();
        for (index, (number, url)) in parts.iter().enumerate() {
            let from = index as u64 * size;
            let etag = self.part(file, url, from, size.min(file.bytes - from), progress)?.ok_or_else(strange)?;
            done.push(json!({"partNumber": number, "etag": etag}));
        }
        self.done("POST", &url, Some(&json!({"oid": file.sha256, "parts": done})))
    }

    /// Uploads a part of a file; what the answer calls it.
    fn part(
        &self,
        file: &Going,
        url: &str,
        from: u64,
        bytes: u64,
        progress: &Progress,
    ) -> Result<Option<String>, Fault> {
        let mut told = 0;
        self.client.patiently(|| {
            let mut open = File::open(&file.place).map_err(Error::io(&file.place, "open"))?;
            open.seek(SeekFrom::Start(from)).map_err(Error::io(&file.place, "read"))?;
            let mut reader = Counted { inner: open.take(bytes), read: 0, told: &mut told, progress };
            let answer = self.client.send("PUT", url, &[], Sent::Stream(&mut reader, bytes))?;
            Ok(header(answer.headers(), "etag").map(str::to_owned))
        })
    }

    /// Makes one commit of everything; its address.
    fn commit(&self, files: &[Going], stale: &[String], message: &str) -> Result<String, Fault> {
        let mut lines = vec![json!({"key": "header", "value": {"summary": message, "description": ""}})];
        for file in files {
            lines.push(match file.large {
                true => json!({"key": "lfsFile", "value": {"path": file.path, "algo": "sha256", "oid": file.sha256, "size": file.bytes}}),
                false => {
                    if file.bytes > LARGEST_REGULAR {
                        let why = format!("{}: the hub takes a file of {:.1} MB only as a large one; list it in the repository's .gitattributes", file.path, file.bytes as f64 / 1e6);
                        return Err(Fault::Other(Error::failed(why)));
                    }
                    let content = std::fs::read(&file.place).map_err(Error::io(&file.place, "read"))?;
                    json!({"key": "file", "value": {"path": file.path, "encoding": "base64", "content": STANDARD.encode(content)}})
                }
            });
        }
        lines.extend(stale.iter().map(|path| json!({"key": "deletedFile", "value": {"path": path}})));
        let body: Vec<u8> = lines.iter().flat_map(|line| format!("{line}\n").into_bytes()).collect();
        let url = self.client.at(&format!("/api/models/{}/commit/main", self.id));
        // Once only: where the answer alone is lost the commit is there.
        let (answer, _) = self.client.json_once("POST", &url, Some(("application/x-ndjson", body)))?;
        let fallback = format!("{}/{}", self.endpoint, self.id);
        Ok(answer["commitUrl"].as_str().map_or(fallback, str::to_owned))
    }
}

/// The type of what git's large files are spoken of in.
const LFS: &str = "application/vnd.git-lfs+json";

/// A reader that tells how far it is, and nothing twice.
struct Counted<'a, R> {
    inner: R,
    read: u64,
    told: &'a mut u64,
    progress: &'a Progress,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.read += count as u64;
        if self.read > *self.told {
            self.progress.step(self.read - *self.told).map_err(std::io::Error::other)?;
            *self.told = self.read;
        }
        Ok(count)
    }
}

/// Weights at the top of a repository that an earlier push has left and these files do not replace.
fn stale(there: &[String], files: &[Going]) -> Vec<String> {
    let weights = |name: &str| {
        name == INDEX || name.starts_with("model") && name.ends_with(".safetensors") && !name.contains('/')
    };
    there.iter().filter(|name| weights(name) && !replaced(name, files)).cloned().collect()
}

fn replaced(name: &str, files: &[Going]) -> bool {
    files.iter().any(|file| file.path == *name)
}

/// The model card of a GGUF file as the page of the repository: where it has none, and where it holds no GGUF files of others, of which that
/// page would tell too.
fn front_page(there: &[String], files: &[Going]) -> Option<Going> {
    let others = |name: &String| name.ends_with(".gguf") && !replaced(name, files);
    if replaced(CARD, files) || (there.iter().any(|name| name == CARD) && there.iter().any(others)) {
        return None;
    }
    let card = files.iter().find(|file| !file.path.contains('/') && file.path.ends_with(&format!(".{CARD}")))?;
    Some(Going { path: CARD.to_owned(), place: card.place.clone(), sha256: String::new(), ..*card })
}

/// The files of an output, as the repository is to call them.
fn going(output: &Path) -> Result<Vec<Going>> {
    let one = |place: PathBuf, path: String| -> Result<Going> {
        let bytes = std::fs::metadata(&place).map_err(Error::io(&place, "open"))?.len();
        Ok(Going { place, path, bytes, sha256: String::new(), large: false })
    };
    if !output.is_dir() {
        let name = |place: &Path| place.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let projector = output.with_file_name(projector_beside(&name(output)));
        let papers = papers_of(output).into_iter().chain([projector]).filter(|paper| paper.is_file());
        let files = parts_of(output)?.into_iter().chain(papers);
        return files.map(|place| one(place.clone(), name(&place))).collect();
    }
    let mut found = Vec::new();
    let mut open = vec![(output.to_owned(), String::new())];
    while let Some((folder, path)) = open.pop() {
        for entry in std::fs::read_dir(&folder).map_err(Error::io(&folder, "list"))? {
            let entry = entry.map_err(Error::io(&folder, "list"))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') {
                continue;
            }
            let inner = if path.is_empty() { name } else { format!("{path}/{name}") };
            match entry.path().is_dir() {
                true => open.push((entry.path(), inner)),
                false => found.push(one(entry.path(), inner)?),
            }
        }
    }
    found.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(found)
}
