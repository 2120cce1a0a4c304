//! What the environment says about the hub, in the words of Hugging Face's own programs.

use std::path::PathBuf;
use std::time::Duration;

use formats::container::file;

use crate::checkpoint::{cache, hub_home};
use crate::error::{Error, Result};

/// The hub where nothing else is said.
pub const HUB: &str = "https://huggingface.co";

/// How long nothing may come where nothing else is said.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the environment says about the hub.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The hub's address, without a slash at its end: HF_ENDPOINT.
    pub endpoint: String,
    /// Who asks: HF_TOKEN, else what stands in HF_TOKEN_PATH, else in `token` in HF_HOME.
    pub token: Option<String>,
    /// The variable that forbids the network, if one does: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE.
    pub offline: Option<&'static str>,
    /// The folder that models lie in.
    pub cache: PathBuf,
    /// How long nothing may come before a connection counts as lost: HF_HUB_DOWNLOAD_TIMEOUT.
    pub patience: Duration,
}

/// What a variable says, where it says anything.
fn said(name: &str) -> Option<String> {
    std::env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

impl Settings {
    /// Reads the environment, and the file of the token.
    ///
    /// Fails for an address that is none, for a token that cannot be sent, and where no variable says where a cache may lie.
    pub fn of_environment() -> Result<Settings> {
        let endpoint = said("HF_ENDPOINT").unwrap_or_else(|| HUB.to_owned()).trim_end_matches('/').to_owned();
        if !["http://", "https://"]
            .iter()
            .any(|scheme| endpoint.strip_prefix(scheme).is_some_and(|host| !host.is_empty()))
        {
            return Err(Error::usage(format!(
                "HF_ENDPOINT is `{endpoint}`, which is no address; say {HUB}, or that of a mirror"
            )));
        }
        let place = said("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(hub_home()?.join("token")));
        let filed =
            || Some(file::read_text(&place?, 1 << 16).ok()?.trim().to_owned()).filter(|token| !token.is_empty());
        let token = said("HF_TOKEN").or_else(|| said("HUGGING_FACE_HUB_TOKEN")).or_else(filed);
        if token.as_ref().is_some_and(|token| !token.bytes().all(|byte| byte.is_ascii_graphic())) {
            return Err(Error::usage(
                "the token in HF_TOKEN, or in its file, has letters that no token has; copy it once more",
            ));
        }
        let yes = |name: &&&'static str| {
            said(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&&value.to_ascii_uppercase()[..]))
        };
        let offline = ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].iter().find(yes).copied();
        let cache = cache().ok_or_else(|| Error::usage("no folder for models is known: set HF_HOME or HOME"))?;
        let patience = said("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|seconds| seconds.parse().ok());
        let patience = patience.filter(|seconds| *seconds > 0).map_or(PATIENCE, Duration::from_secs);
        Ok(Settings { endpoint, token, offline, cache, patience })
    }
}
