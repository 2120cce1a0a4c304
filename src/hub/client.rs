//! HTTP as the hub speaks it: who asks, redirects, what an answer that is none means, and trying again.
//!
//! The token goes to the hub itself and to nobody else: what lies elsewhere is fetched from there by an address that the hub has signed.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use ureq::http::request::Builder;
use ureq::http::{HeaderMap, Request, Response};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, AsSendBody, SendBody};

use super::settings::{HUB, Settings};
use crate::error::{Error, Result};

/// How often something is tried that may pass.
const TRIES: u32 = 6;

/// The first pause before trying again; each is twice as long as the one before.
const PAUSE: Duration = Duration::from_millis(400);

/// The longest pause that the hub may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Redirects of one request.
const REDIRECTS: usize = 8;

/// Bytes of an answer that is no file.
const LARGEST_ANSWER: u64 = 256 << 20;

/// Why a request has not done what it should.
#[derive(Debug)]
pub enum Fault {
    /// Nobody was there to ask.
    Unreachable(String),
    /// The connection broke, or nothing came any more.
    Lost(String),
    /// The answer was one of HTTP's errors.
    Status {
        /// HTTP's number.
        status: u16,
        /// The hub's own word for it, as `GatedRepo`; empty where there is none.
        code: String,
        /// What the hub says about it.
        message: String,
        /// How long the hub asks to wait.
        wait: Option<Duration>,
    },
    /// It has nothing to do with the network.
    Other(Error),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        Fault::Other(error)
    }
}

/// What is sent along.
pub enum Sent<'a> {
    /// Nothing.
    Nothing,
    /// Bytes of a type.
    Bytes(&'a str, &'a [u8]),
    /// So many bytes of a reader, of no type.
    Stream(&'a mut dyn Read, u64),
}

/// What asks the hub.
pub struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    /// It was there at least once, so that it is worth to wait for it.
    reached: AtomicBool,
}

impl Client {
    /// What asks the hub that the environment names.
    pub fn new(settings: &Settings) -> Client {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        // Those that the system trusts, so that a company's own are among them.
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::PlatformVerifier)
            .unversioned_rustls_crypto_provider(provider)
            .build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("quantc/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(settings.patience))
            .timeout_connect(Some(settings.patience))
            .timeout_per_read(Some(settings.patience))
            .timeout_per_write(Some(settings.patience))
            .build();
        let (endpoint, token) = (settings.endpoint.clone(), settings.token.clone());
        Client { agent: config.new_agent(), endpoint, token, reached: AtomicBool::new(false) }
    }

    /// An address of the hub: what follows its own, which begins with a slash.
    pub fn at(&self, path: &str) -> String {
        format!("{}{path}", self.endpoint)
    }

    /// An address that the hub gave: a mirror may give that of the hub that it mirrors.
    pub fn as_mirrored(&self, url: &str) -> String {
        match url.strip_prefix(HUB) {
            Some(path) if path.starts_with('/') => self.at(path),
            _ => url.to_owned(),
        }
    }

    /// Whether there is a token.
    pub fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// Sends a request and follows redirects; an answer that is a success.
    pub fn send(
        &self,
        method: &str,
        url: &str,
        headers: &[(&str, &str)],
        sent: Sent<'_>,
    ) -> Result<Response<ureq::Body>, Fault> {
        let mut url = url.to_owned();
        let (bytes, mut stream) = match sent {
            Sent::Nothing => (None, None),
            Sent::Bytes(kind, bytes) => (Some((kind, bytes)), None),
            Sent::Stream(reader, bytes) => (None, Some((reader, bytes))),
        };
        for _ in 0..REDIRECTS {
            let mut request = Request::builder().method(method).uri(&url).header("accept-encoding", "identity");
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            if let Some(token) = self.token.as_ref().filter(|_| origin(&url) == origin(&self.endpoint)) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            // A stream can be sent once.
            let again = stream.is_none();
            let answer = match (stream.take(), bytes) {
                (Some((reader, bytes)), _) => {
                    self.run(&url, request.header("content-length", bytes), SendBody::from_reader(reader))?
                }
                (None, Some((kind, bytes))) => self.run(&url, request.header("content-type", kind), bytes)?,
                (None, None) => self.run(&url, request, ())?,
            };
            self.reached.store(true, Ordering::Relaxed);
            let status = answer.status().as_u16();
            match header(answer.headers(), "location") {
                Some(to) if [301, 302, 303, 307, 308].contains(&status) && again => url = joined(&url, to),
                _ if (200..300).contains(&status) => return Ok(answer),
                _ => return Err(status_of(answer)),
            }
        }
        Err(Fault::Other(Error::failed(format!(
            "{url}: the hub redirects in circles; try again later, or check HF_ENDPOINT"
        ))))
    }

    fn run(&self, url: &str, request: Builder, body: impl AsSendBody) -> Result<Response<ureq::Body>, Fault> {
        let wrong = |error| Fault::Other(Error::failed(format!("{url}: no address that can be asked: {error}")));
        self.agent.run(request.body(body).map_err(wrong)?).map_err(|error| fault_of(url, &error))
    }

    /// Does something again where what went wrong may pass, after pauses.
    pub fn patiently<T>(&self, mut work: impl FnMut() -> Result<T, Fault>) -> Result<T, Fault> {
        let mut pause = PAUSE;
        for _ in 1..TRIES {
            let wait = match work() {
                Err(Fault::Lost(_)) => None,
                Err(Fault::Unreachable(_)) if self.reached.load(Ordering::Relaxed) => None,
                Err(Fault::Status { status: 408 | 429 | 500..=599, wait, .. }) => wait,
                done => return done,
            };
            std::thread::sleep(wait.unwrap_or(pause).min(LONGEST_PAUSE));
            pause *= 2;
        }
        work()
    }

    /// What the hub answers in JSON, and the address of the answer's next part.
    pub fn json(&self, method: &str, url: &str, body: Option<&Value>) -> Result<(Value, Option<String>), Fault> {
        self.patiently(|| {
            self.json_once(method, url, body.map(|body| ("application/json", body.to_string().into_bytes())))
        })
    }

    /// The same, of bytes of a type, and once only.
    pub fn json_once(
        &self,
        method: &str,
        url: &str,
        body: Option<(&str, Vec<u8>)>,
    ) -> Result<(Value, Option<String>), Fault> {
        let sent = body.as_ref().map_or(Sent::Nothing, |(kind, bytes)| Sent::Bytes(kind, bytes));
        let answer = self.send(method, url, &[("accept", "application/json")], sent)?;
        let next = header(answer.headers(), "link").and_then(next_of).map(|next| self.as_mirrored(&joined(url, next)));
        let read = answer.into_body().into_with_config().limit(LARGEST_ANSWER).read_to_vec();
        let bytes = read.map_err(|error| fault_of(url, &error))?;
        let value = serde_json::from_slice(&bytes).map_err(|_| {
            Fault::Other(Error::failed(format!(
                "{url}: the answer is not that of a hub; check HF_ENDPOINT, and whether a proxy or a login page of the network answers"
            )))
        })?;
        Ok((value, next))
    }

    /// What to tell of a fault: what was about to be done, and with which repository.
    pub fn told(&self, fault: Fault, doing: &str, id: &str) -> Error {
        let Client { endpoint, .. } = self;
        let with = self.has_token();
        let tokens = format!("{endpoint}/settings/tokens");
        Error::failed(match fault {
            Fault::Other(error) => return error,
            Fault::Unreachable(why) => format!(
                "{doing}: cannot reach the hub: {why}; check the network, a proxy (HTTPS_PROXY) and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to \
                 work with what is on this disk"
            ),
            Fault::Lost(why) => {
                format!(
                    "{doing}: the connection broke {TRIES} times: {why}; try again, and it goes on where it stopped"
                )
            }
            Fault::Status { code, message, .. } if code == "GatedRepo" => {
                let token = match with {
                    true => "with the account of your token (HF_TOKEN)".to_owned(),
                    false => format!("and set HF_TOKEN to a token of that account from {tokens}"),
                };
                format!(
                    "{doing}: {id} is open only to those who accept its licence{}: accept it at {endpoint}/{id} {token}",
                    after(&message)
                )
            }
            Fault::Status { code, .. } if code == "RevisionNotFound" => {
                format!("{doing}: {id} has no such branch, tag or commit; {endpoint}/{id}/commits/main lists them")
            }
            Fault::Status { code, .. } if code == "EntryNotFound" => {
                format!("{doing}: the file is not there any more; try again")
            }
            Fault::Status { status: 401, message, .. } if with => {
                format!(
                    "{doing}: the hub does not know your token{}: set HF_TOKEN to a valid one from {tokens}, or check the name {id}",
                    after(&message)
                )
            }
            Fault::Status { status: 401, .. } => format!(
                "{doing}: the hub has no public {id}: check the name, or set HF_TOKEN to a token from {tokens} where it is private"
            ),
            Fault::Status { status: 403, message, .. } => format!(
                "{doing}: your token may not do that with {id}{}: take one from {tokens} that may",
                after(&message)
            ),
            Fault::Status { status: 404, .. } => {
                let private = if with { "" } else { ", or set HF_TOKEN where it is private" };
                format!("{doing}: the hub has no {id}: check the name{private}")
            }
            Fault::Status { status, message, .. } => {
                let later = if status == 429 || status >= 500 {
                    "; try again later, and it goes on where it stopped"
                } else {
                    ""
                };
                format!("{doing}: the hub answered {status}{}{later}", after(&message))
            }
        })
    }
}

/// A message of the hub's in brackets, where there is one.
fn after(message: &str) -> String {
    let line: String = message.trim().chars().take(300).collect();
    if line.is_empty() { line } else { format!(" ({line})") }
}

/// The text of a header.
pub fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> String {
    let end = url.find("://").map_or(0, |at| at + 3);
    let path = url[end..].find(['/', '?', '#']).map_or(url.len(), |at| end + at);
    url[..path].to_ascii_lowercase()
}

/// An address that is seen from another.
fn joined(base: &str, to: &str) -> String {
    let (scheme, _) = base.split_once("://").unwrap_or(("https", base));
    match to {
        _ if to.contains("://") && !to.starts_with('/') => to.to_owned(),
        _ if to.starts_with("//") => format!("{scheme}:{to}"),
        _ if to.starts_with('/') => format!("{}{to}", &base[..origin(base).len()]),
        _ => format!(
            "{}/{to}",
            base.split(['?', '#']).next().unwrap_or(base).rsplit_once('/').map_or(base, |(folder, _)| folder)
        ),
    }
}

/// The address of the next page in a `link` header.
fn next_of(link: &str) -> Option<&str> {
    let next = link.split(',').find(|part| part.contains("rel=\"next\""))?;
    next.split_once('<')?.1.split_once('>').map(|(url, _)| url)
}

/// A name as a part of an address; slashes stay where they part folders.
pub fn quoted(text: &str, slashes: bool) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || byte == b'/' && slashes;
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// Who answers is not known to be whom it says.
fn insecure(why: &str) -> Fault {
    Fault::Other(Error::failed(format!(
        "no secure connection can be made to {why}; check the system's certificates (SSL_CERT_FILE names others), its clock and proxies"
    )))
}

/// What kept a request from being answered.
pub fn fault_of(url: &str, error: &ureq::Error) -> Fault {
    use ureq::{Error as E, Timeout};
    let host = origin(url);
    let why = format!("{host}: {error}");
    let by_tls = |source: &std::io::Error| source.get_ref().is_some_and(|inner| inner.is::<rustls::Error>());
    match error {
        E::Io(source) if by_tls(source) => insecure(&why),
        E::HostNotFound | E::ConnectionFailed | E::Timeout(Timeout::Resolve | Timeout::Connect) => {
            Fault::Unreachable(why)
        }
        E::Timeout(_) => Fault::Lost(format!("{host}: nothing came for too long ({error})")),
        E::Io(source) if source.kind() == std::io::ErrorKind::ConnectionRefused => Fault::Unreachable(why),
        E::Io(_) | E::Protocol(_) | E::BodyStalled => Fault::Lost(why),
        E::Rustls(_) | E::Tls(_) => insecure(&why),
        _ => Fault::Unreachable(why),
    }
}

/// What an answer that is an error says.
fn status_of(answer: Response<ureq::Body>) -> Fault {
    let status = answer.status().as_u16();
    let text = |name: &str| header(answer.headers(), name).map(str::to_owned);
    let (code, said) = (text("x-error-code").unwrap_or_default(), text("x-error-message"));
    let wait = text("retry-after").and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
    let body = answer.into_body().into_with_config().limit(1 << 16).read_to_vec().unwrap_or_default();
    let told = || Some(serde_json::from_slice::<Value>(&body).ok()?["error"].as_str()?.to_owned());
    Fault::Status { status, code, message: said.or_else(told).unwrap_or_default(), wait }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_seen_from_others() {
        let base = "https://Hub.co:8/api/x?y=1";
        assert_eq!(joined(base, "https://a.b/c"), "https://a.b/c");
        assert_eq!(joined(base, "//a.b/c"), "https://a.b/c");
        assert_eq!(joined(base, "/c?d=http://e"), "https://Hub.co:8/c?d=http://e");
        assert_eq!(joined(base, "c"), "https://Hub.co:8/api/c");
        assert_eq!(origin(base), "https://hub.co:8");
        assert_ne!(origin("https://hub.co.evil.org/x"), origin("https://hub.co/x"));
        assert_ne!(origin("http://hub.co/x"), origin("https://hub.co/x"));
        assert_eq!(next_of("<https://a/b?c=1>; rel=\"next\""), Some("https://a/b?c=1"));
        assert_eq!(next_of("<https://a/b>; rel=\"prev\""), None);
        assert_eq!(quoted("refs/pr/1 ä", false), "refs%2Fpr%2F1%20%C3%A4");
        assert_eq!(quoted("q/m v.gguf", true), "q/m%20v.gguf");
    }
}
