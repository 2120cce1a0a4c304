//! A hub on this machine: as much of the real one's HTTP as downloads and uploads need, with its headers, redirects and errors.
//!
//! It listens on 127.0.0.1 and gives large files at `localhost`, which is another host to whoever asks.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The only token that the hub knows.
pub const TOKEN: &str = "hf_known";

/// From this size on a file is a large one.
const LARGE: usize = 100_000;

/// A repository.
#[derive(Clone, Default)]
pub struct Repo {
    pub commit: String,
    pub files: BTreeMap<String, Vec<u8>>,
    pub gated: bool,
    pub private: bool,
}

/// What the hub was asked.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: String,
    pub path: String,
    pub headers: BTreeMap<String, String>,
}

/// What the hub does wrong.
#[derive(Default)]
pub struct Faults {
    /// Answers with a large file that end after so many bytes.
    pub cuts: AtomicUsize,
    /// After how many bytes.
    pub cut_after: AtomicUsize,
    /// Where a cut is to be, nothing comes any more instead.
    pub stalls: AtomicBool,
    /// Large files have another first byte.
    pub spoils: AtomicBool,
    /// Small files have another first byte.
    pub spoils_small: AtomicBool,
    /// Uploads that fail.
    pub refuses_uploads: AtomicUsize,
    /// Ranges are ignored.
    pub knows_no_ranges: AtomicBool,
    /// Uploads are asked for in parts of so many bytes; 0 for one.
    pub part: AtomicUsize,
    /// Files of a page of a listing; 0 for all.
    pub page: AtomicUsize,
}

#[derive(Default)]
struct State {
    repos: Mutex<BTreeMap<String, Repo>>,
    asked: Mutex<Vec<Asked>>,
    uploaded: Mutex<BTreeMap<String, Vec<u8>>>,
    faults: Faults,
    over: AtomicBool,
}

/// The hub; it ends with this.
pub struct Hub {
    port: u16,
    state: Arc<State>,
}

/// SHA-256 in hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What git calls a file.
fn git_hash(bytes: &[u8]) -> String {
    let whole = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    Sha1::digest(whole).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Hub {
    pub fn start() -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(State::default());
        let of_thread = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if of_thread.over.load(Ordering::Relaxed) {
                    return;
                }
                let (Ok(stream), state) = (stream, of_thread.clone()) else { continue };
                // Whoever asks may go away at any moment.
                std::thread::spawn(move || drop(Answer { state: &state, port, stream }.give()));
            }
        });
        Hub { port, state }
    }

    pub fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Publishes a model; its commit is told by its content.
    pub fn publish(&self, id: &str, files: impl IntoIterator<Item = (String, Vec<u8>)>) -> String {
        let files: BTreeMap<_, _> = files.into_iter().collect();
        let all: Vec<u8> = files.iter().flat_map(|(name, bytes)| [name.as_bytes(), bytes].concat()).collect();
        let commit = sha256(&all)[..40].to_owned();
        let repo = Repo { commit: commit.clone(), files, ..Repo::default() };
        self.repos().insert(id.to_owned(), repo);
        commit
    }

    pub fn repos(&self) -> MutexGuard<'_, BTreeMap<String, Repo>> {
        self.state.repos.lock().unwrap()
    }

    pub fn faults(&self) -> &Faults {
        &self.state.faults
    }

    /// What was asked since this was called last.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state.asked.lock().unwrap())
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.state.over.store(true, Ordering::Relaxed);
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

/// One answer.
struct Answer<'a> {
    state: &'a State,
    port: u16,
    stream: TcpStream,
}

impl Answer<'_> {
    fn give(mut self) -> std::io::Result<()> {
        let mut reader = BufReader::new(self.stream.try_clone()?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let mut words = line.split_whitespace().map(str::to_owned);
        let (Some(method), Some(path)) = (words.next(), words.next()) else { return Ok(()) };
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        if headers.get("expect").is_some_and(|expected| expected.contains("100")) {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let mut body = Vec::new();
        if let Some(length) = headers.get("content-length").and_then(|length| length.parse().ok()) {
            reader.take(length).read_to_end(&mut body)?;
        } else if headers.get("transfer-encoding").is_some_and(|coding| coding == "chunked") {
            loop {
                let mut line = String::new();
                reader.read_line(&mut line)?;
                let count = u64::from_str_radix(line.trim(), 16).unwrap_or(0);
                reader.by_ref().take(count).read_to_end(&mut body)?;
                reader.read_line(&mut line)?;
                if count == 0 {
                    break;
                }
            }
        }
        let asked = Asked { method, path, headers };
        self.state.asked.lock().unwrap().push(asked.clone());
        self.route(&asked, &body)
    }

    fn send(&mut self, asked: &Asked, status: u16, headers: &[(&str, String)], body: &[u8]) -> std::io::Result<()> {
        let mut head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
        headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
        self.stream.write_all(format!("{head}\r\n").as_bytes())?;
        if asked.method != "HEAD" {
            self.stream.write_all(body)?;
        }
        self.stream.flush()
    }

    fn json(&mut self, asked: &Asked, value: &Value) -> std::io::Result<()> {
        self.send(asked, 200, &[("Content-Type", "application/json".to_owned())], value.to_string().as_bytes())
    }

    fn error(&mut self, asked: &Asked, status: u16, code: &str, message: &str) -> std::io::Result<()> {
        let headers = [("X-Error-Code", code.to_owned()), ("X-Error-Message", message.to_owned())];
        self.send(asked, status, &headers, json!({"error": message}).to_string().as_bytes())
    }

    fn route(&mut self, asked: &Asked, body: &[u8]) -> std::io::Result<()> {
        let (path, query) = asked.path.split_once('?').unwrap_or((&asked.path, ""));
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let said = asked.headers.get("authorization").map(|said| said.trim_start_matches("Bearer ").to_owned());
        if said.as_ref().is_some_and(|token| ![TOKEN, "hf_reads"].contains(&&token[..])) {
            return self.error(asked, 401, "", "Invalid credentials in Authorization header");
        }
        let parsed: Value = serde_json::from_slice(body).unwrap_or_default();
        match (&asked.method[..], &parts[..]) {
            ("GET", ["cdn", hash]) => return self.large(asked, hash),
            ("PUT", ["upload", hash, from]) => return self.upload(asked, hash, from.parse().unwrap(), body),
            ("POST", ["complete", hash]) => {
                let whole = self.state.uploaded.lock().unwrap().get(*hash).is_some_and(|bytes| sha256(bytes) == **hash);
                let tags =
                    parsed["parts"].as_array().is_some_and(|parts| parts.iter().all(|part| part["etag"].is_string()));
                return if whole && tags {
                    self.json(asked, &json!({}))
                } else {
                    self.error(asked, 400, "", "not whole")
                };
            }
            (_, ["api", "whoami-v2"]) if said.is_none() => return self.error(asked, 401, "", ""),
            (_, ["api", "whoami-v2"]) => {
                let role = if said.as_deref() == Some(TOKEN) { "write" } else { "read" };
                return self.json(asked, &json!({"name": "org", "auth": {"accessToken": {"role": role}}}));
            }
            ("POST", ["api", "validate-yaml"]) => {
                return self.json(asked, &json!({"errors": [], "warnings": []}));
            }
            ("POST", ["api", "repos", "create"]) => return self.create(asked, &parsed),
            _ => {}
        }
        let id = match &parts[..] {
            ["api", "models", owner, name, ..] | ["api", "resolve-cache", "models", owner, name, ..] => {
                format!("{owner}/{name}")
            }
            [owner, name, ..] => format!("{owner}/{}", name.trim_end_matches(".git")),
            _ => String::new(),
        };
        let Some(repo) = self.state.repos.lock().unwrap().get(&id).cloned() else {
            return match said {
                Some(_) => self.error(asked, 404, "RepoNotFound", "Repository not found"),
                None => self.error(asked, 401, "RepoNotFound", "Repository not found"),
            };
        };
        if said.is_none() && (repo.private || asked.method == "POST") {
            return self.error(asked, 401, "RepoNotFound", "Repository not found");
        }
        match (&asked.method[..], &parts[..]) {
            ("GET", ["api", "models", _, _]) => self.json(asked, &info(&id, &repo)),
            ("GET", ["api", "models", _, _, "revision", revision]) => match known(&repo, revision) {
                true => self.json(asked, &info(&id, &repo)),
                false => self.error(asked, 404, "RevisionNotFound", "Invalid rev id"),
            },
            ("GET", ["api", "models", _, _, "tree", _]) => self.tree(asked, &repo, query),
            (_, ["api", "resolve-cache", "models", _, _, _, rest @ ..]) => self.small(asked, &repo, &rest.join("/")),
            (_, [_, _, "resolve", revision, rest @ ..]) if known(&repo, revision) => {
                self.resolve(asked, &id, &repo, &rest.join("/"), said.is_some())
            }
            ("POST", ["api", "models", _, _, "preupload", _]) => self.preupload(asked, &parsed),
            ("POST", [_, _, "info", "lfs", "objects", "batch"]) => self.batch(asked, &parsed),
            ("POST", [_, _, "verify"]) => self.json(asked, &json!({})),
            ("POST", ["api", "models", _, _, "commit", _]) => self.commit(asked, &id, body),
            _ => self.error(asked, 404, "EntryNotFound", "Entry not found"),
        }
    }

    fn resolve(&mut self, asked: &Asked, id: &str, repo: &Repo, path: &str, known: bool) -> std::io::Result<()> {
        if repo.gated && !known {
            return self.error(
                asked,
                401,
                "GatedRepo",
                "Access to model org/x is restricted. You must have access to it",
            );
        }
        let Some(bytes) = repo.files.get(path) else {
            return self.error(asked, 404, "EntryNotFound", "Entry not found");
        };
        let mut headers = vec![("X-Repo-Commit", repo.commit.clone()), ("X-Linked-Size", bytes.len().to_string())];
        if bytes.len() < LARGE {
            headers.push(("Location", format!("/api/resolve-cache/models/{id}/{}/{path}", repo.commit)));
            headers.push(("X-Linked-ETag", format!("\"{}\"", git_hash(bytes))));
            return self.send(asked, 307, &headers, b"");
        }
        headers.push(("X-Linked-ETag", format!("\"{}\"", sha256(bytes))));
        headers.push(("Location", format!("http://localhost:{}/cdn/{}?signed=yes", self.port, sha256(bytes))));
        self.send(asked, 302, &headers, b"")
    }

    fn small(&mut self, asked: &Asked, repo: &Repo, path: &str) -> std::io::Result<()> {
        let mut spoilt = repo.files[path].clone();
        let spoils = self.state.faults.spoils_small.load(Ordering::Relaxed);
        spoilt.iter_mut().take(usize::from(spoils)).for_each(|byte| *byte ^= 1);
        let (bytes, sent) = (&repo.files[path], &spoilt);
        let headers = [("X-Repo-Commit", repo.commit.clone()), ("ETag", format!("\"{}\"", git_hash(bytes)))];
        self.send(asked, 200, &headers, sent)
    }

    /// A large file, or a range of it.
    fn large(&mut self, asked: &Asked, hash: &str) -> std::io::Result<()> {
        let repos = self.state.repos.lock().unwrap().clone();
        let found = repos.values().flat_map(|repo| repo.files.values()).find(|bytes| sha256(bytes) == hash);
        let Some(mut bytes) = found.cloned() else { return self.error(asked, 404, "", "") };
        let faults = &self.state.faults;
        if faults.spoils.load(Ordering::Relaxed) {
            bytes[0] ^= 1;
        }
        let length = bytes.len();
        let range = asked.headers.get("range").and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
        let range = range.filter(|_| !faults.knows_no_ranges.load(Ordering::Relaxed));
        let range = range
            .map(|(from, to)| (from.parse().unwrap(), to.parse().map_or(length, |to: usize| (to + 1).min(length))));
        let (from, to) = range.unwrap_or((0, length));
        if from >= to {
            return self.send(asked, 416, &[], b"");
        }
        let body = &bytes[from..to];
        let mut head = format!(
            "HTTP/1.1 {} X\r\nConnection: close\r\nContent-Length: {}\r\n",
            if range.is_some() { 206 } else { 200 },
            body.len()
        );
        if range.is_some() {
            head += &format!("Content-Range: bytes {from}-{}/{length}\r\n", to - 1);
        }
        let cuts = faults.cuts.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
        let until = if cuts { faults.cut_after.load(Ordering::Relaxed).min(body.len()) } else { body.len() };
        self.stream.write_all(format!("{head}\r\n").as_bytes())?;
        self.stream.write_all(&body[..until])?;
        self.stream.flush()?;
        while cuts && faults.stalls.load(Ordering::Relaxed) && !self.state.over.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn tree(&mut self, asked: &Asked, repo: &Repo, query: &str) -> std::io::Result<()> {
        let files: Vec<(&String, &Vec<u8>)> = repo.files.iter().collect();
        let from = query.split('&').find_map(|part| part.strip_prefix("cursor=")?.parse().ok()).unwrap_or(0);
        let page = match self.state.faults.page.load(Ordering::Relaxed) {
            0 => files.len(),
            page => page,
        };
        let to = files.len().min(from + page);
        let mut entries: Vec<Value> = files[from..to].iter().map(|(path, bytes)| entry(path, bytes)).collect();
        let folders: BTreeSet<&str> = files.iter().filter_map(|(path, _)| Some(path.split_once('/')?.0)).collect();
        if from == 0 {
            entries.extend(
                folders.iter().map(|path| json!({"type": "directory", "oid": "0".repeat(40), "size": 0, "path": path})),
            );
        }
        let mut headers = vec![("Content-Type", "application/json".to_owned())];
        if to < files.len() {
            let address = asked.path.split('?').next().unwrap();
            headers.push((
                "Link",
                format!("<http://127.0.0.1:{}{address}?recursive=true&cursor={to}>; rel=\"next\"", self.port),
            ));
        }
        self.send(asked, 200, &headers, Value::Array(entries).to_string().as_bytes())
    }

    fn create(&mut self, asked: &Asked, said: &Value) -> std::io::Result<()> {
        let id = format!("{}/{}", said["organization"].as_str().unwrap(), said["name"].as_str().unwrap());
        if self.state.repos.lock().unwrap().contains_key(&id) {
            let url = format!("http://127.0.0.1:{}/{id}", self.port);
            let body = json!({"error": "You already created this model repo", "url": url});
            return self.send(asked, 409, &[], body.to_string().as_bytes());
        }
        let files = BTreeMap::from([(".gitattributes".to_owned(), b"*.safetensors filter=lfs\n".to_vec())]);
        let private = said["visibility"] == "private";
        self.state
            .repos
            .lock()
            .unwrap()
            .insert(id.clone(), Repo { commit: "0".repeat(40), files, gated: false, private });
        let url = format!("http://127.0.0.1:{}/{id}", self.port);
        self.json(asked, &json!({"url": url, "name": id, "id": "1"}))
    }

    fn preupload(&mut self, asked: &Asked, said: &Value) -> std::io::Result<()> {
        let mode = |file: &Value| {
            let large = file["size"].as_u64().unwrap() as usize >= LARGE;
            assert!(file["sample"].is_string());
            json!({"path": file["path"], "uploadMode": if large { "lfs" } else { "regular" }, "shouldIgnore": false, "oid": null})
        };
        let files: Vec<Value> = said["files"].as_array().unwrap().iter().map(mode).collect();
        self.json(asked, &json!({"files": files}))
    }

    fn batch(&mut self, asked: &Asked, said: &Value) -> std::io::Result<()> {
        let known = self.state.uploaded.lock().unwrap().clone();
        let part = self.state.faults.part.load(Ordering::Relaxed);
        let id = asked.path.trim_start_matches('/').split(".git/").next().unwrap().to_owned();
        let hub = format!("http://127.0.0.1:{}", self.port);
        let other = format!("http://localhost:{}", self.port);
        let object = |object: &Value| {
            let (oid, size) = (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap() as usize);
            if known.get(oid).is_some_and(|bytes| sha256(bytes) == oid) {
                return json!({"oid": oid, "size": size});
            }
            let verify = json!({"href": format!("{hub}/{id}/verify"), "header": {}});
            let upload = match part {
                0 => json!({"href": format!("{other}/upload/{oid}/0"), "header": {}}),
                part => {
                    let mut header = json!({"chunk_size": part.to_string()});
                    for number in 0..size.div_ceil(part) {
                        header[format!("{:05}", number + 1)] = format!("{other}/upload/{oid}/{}", number * part).into();
                    }
                    json!({"href": format!("{hub}/complete/{oid}"), "header": header})
                }
            };
            json!({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        };
        let objects: Vec<Value> = said["objects"].as_array().unwrap().iter().map(object).collect();
        self.json(asked, &json!({"transfer": if part > 0 { "multipart" } else { "basic" }, "objects": objects}))
    }

    fn upload(&mut self, asked: &Asked, hash: &str, from: usize, body: &[u8]) -> std::io::Result<()> {
        let faults = &self.state.faults.refuses_uploads;
        if faults.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            return self.error(asked, 500, "", "Internal Error");
        }
        let mut uploaded = self.state.uploaded.lock().unwrap();
        let bytes = uploaded.entry(hash.to_owned()).or_default();
        bytes.resize(bytes.len().max(from + body.len()), 0);
        bytes[from..from + body.len()].copy_from_slice(body);
        drop(uploaded);
        self.send(asked, 200, &[("ETag", format!("\"part-{from}\""))], b"")
    }

    fn commit(&mut self, asked: &Asked, id: &str, body: &[u8]) -> std::io::Result<()> {
        let lines: Vec<Value> =
            body.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
        let mut files = self.state.repos.lock().unwrap()[id].files.clone();
        assert!(lines[0]["key"] == "header" && lines[0]["value"]["summary"].is_string());
        for line in &lines[1..] {
            let value = &line["value"];
            let path = value["path"].as_str().unwrap().to_owned();
            let bytes = match line["key"].as_str().unwrap() {
                "file" => STANDARD.decode(value["content"].as_str().unwrap()).unwrap(),
                "lfsFile" => match self.state.uploaded.lock().unwrap().get(value["oid"].as_str().unwrap()) {
                    Some(bytes) => bytes.clone(),
                    None => return self.error(asked, 422, "", "LFS pointer pointed to a file that does not exist"),
                },
                _ => {
                    files.remove(&path);
                    continue;
                }
            };
            files.insert(path, bytes);
        }
        let all: Vec<u8> = files.values().flatten().copied().collect();
        let commit = sha256(&all)[..40].to_owned();
        let mut repos = self.state.repos.lock().unwrap();
        let repo = repos.get_mut(id).unwrap();
        (repo.files, repo.commit) = (files, commit.clone());
        drop(repos);
        let url = format!("http://127.0.0.1:{}/{id}/commit/{commit}", self.port);
        self.json(asked, &json!({"success": true, "commitOid": commit, "commitUrl": url, "hookOutput": ""}))
    }
}

fn known(repo: &Repo, revision: &str) -> bool {
    ["main", "v1", "refs%2Fpr%2F1"].contains(&revision) || repo.commit.starts_with(revision)
}

fn info(id: &str, repo: &Repo) -> Value {
    let siblings: Vec<Value> = repo.files.keys().map(|path| json!({"rfilename": path})).collect();
    json!({"_id": "1", "id": id, "modelId": id, "sha": repo.commit, "private": repo.private, "gated": repo.gated, "siblings": siblings, "tags": [], "downloads": 0})
}

fn entry(path: &str, bytes: &[u8]) -> Value {
    let hash = sha256(bytes);
    let mut entry = json!({"type": "file", "oid": git_hash(bytes), "size": bytes.len(), "path": path});
    if bytes.len() >= LARGE {
        entry["lfs"] = json!({"oid": hash, "size": bytes.len(), "pointerSize": 134});
    }
    entry
}
