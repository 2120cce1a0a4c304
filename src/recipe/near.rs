//! What a request that cannot be met was near to, as the flags that would do it.

use formats::{Codec, Scheme};

use super::preset;
use crate::error::Error;
use crate::mixes::{MIXES, Mix};
use crate::words::nearest;

/// Names of the schemes of integers.
const INTEGERS: &[&str] = &["W4A16", "W8A16", "W3A16", "W2A16", "W4A16_ASYM", "W8A16_ASYM", "W3A16_ASYM", "W2A16_ASYM"];

/// The mix of a GGUF file that takes about so many bits for each weight.
fn mix_of(bits: u8) -> Option<&'static str> {
    let all = [(2, "Q2_K"), (3, "Q3_K_M"), (4, "Q4_K_M"), (5, "Q5_K_M"), (6, "Q6_K"), (8, "Q8_0")];
    all.iter().find(|(known, _)| *known == bits).map(|(_, name)| *name)
}

/// Names of the mixes of GGUF files, and what else they are called.
fn mixes() -> impl Iterator<Item = &'static str> {
    MIXES.iter().flat_map(|mix| std::iter::once(mix.name).chain(mix.aliases.iter().copied()))
}

/// Why `codec` writes no scheme of this name.
pub(super) fn no_scheme(codec: &dyn Codec, name: &str) -> Error {
    let format = codec.id();
    if let Some(other) = formats::CODECS.iter().find(|other| preset(**other, name).is_some()) {
        return Error::usage(format!(
            "scheme `{name}` is one of {0}, and the format is {format}: write that (--format {0}), or name another scheme",
            other.id(),
        ));
    }
    if let Some(mix) = Mix::parse(name) {
        return Error::usage(format!(
            "scheme `{name}` is one of GGUF's, and the format is {format}: for a GGUF file say --scheme {} -o NAME.gguf, without another \
             --format; or name another scheme",
            mix.name
        ));
    }
    let own = nearest(name, INTEGERS.iter().chain(codec.presets()).copied()).map(str::to_owned);
    let meant = own.or_else(|| nearest(name, mixes()).map(|mix| format!("{mix} -o NAME.gguf")));
    let meant = meant.map_or(String::new(), |scheme| format!("did you mean --scheme {scheme}? "));
    Error::usage(format!(
        "scheme `{name}` is not known; {meant}there are W4A16, W4A16_ASYM, W8A16, W3A16 and W2A16 (each also with _ASYM)"
    ))
}

/// Why a GGUF file has no scheme of this name.
pub(super) fn no_mix(name: &str) -> Error {
    let known: Vec<&str> = MIXES.iter().map(|mix| mix.name).collect();
    let known = known.join(", ");
    if let Some(scheme) = Scheme::preset(name) {
        let mix = mix_of(scheme.bits).map_or(String::new(), |mix| format!(" did you mean --scheme {mix}?"));
        return Error::usage(format!(
            "scheme `{name}` is not one of GGUF's;{mix} {name} goes into a directory: -o DIR, without --format gguf. GGUF has {known}"
        ));
    }
    let meant = nearest(name, mixes()).map_or(String::new(), |mix| format!("did you mean --scheme {mix}? "));
    Error::usage(format!("scheme `{name}` is not one of GGUF's; {meant}there are {known}"))
}

/// The end of a sentence on codes of so many bits that no directory holds.
pub(super) fn bits_of_gguf(bits: u8) -> String {
    let mix = if [2, 3, 4, 8].contains(&bits) { None } else { mix_of(bits) };
    mix.map_or(String::new(), |mix| format!("; a GGUF file has types of {bits}: --scheme {mix} -o NAME.gguf"))
}

/// The end of a sentence on a width that was asked of a GGUF file.
pub(super) fn mix_for_bits(bits: Option<u8>) -> String {
    let mix = bits.and_then(|bits| Some((bits, mix_of(bits)?)));
    mix.map_or(String::new(), |(bits, mix)| format!("; for about {bits} bits say --scheme {mix}"))
}

/// Why there is no format of this name.
pub(super) fn no_format(name: &str) -> Error {
    let known: Vec<&str> = formats::CODECS.iter().map(|codec| codec.id()).chain(["gguf"]).collect();
    let meant = nearest(name, known.iter().copied());
    let meant = meant.map_or(String::new(), |format| format!("did you mean --format {format}? "));
    Error::usage(format!("format `{name}` is not known; {meant}there are {}", known.join(", ")))
}
