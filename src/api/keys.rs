//! Requests from the keys that recipes and `quantc.toml` have.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::words::nearest;

/// Fails for a key that a `T` does not have: with what it is called, and the one that may have been meant.
pub(super) fn known<T: Default + Serialize>(given: &Map<String, Value>) -> Result<(), String> {
    let all = serde_json::to_value(T::default()).expect("plain data");
    let known: Vec<&str> = all.as_object().into_iter().flatten().map(|(key, _)| &**key).collect();
    match given.keys().find(|key| !known.contains(&&***key)) {
        None => Ok(()),
        Some(key) => Err(match nearest(key, known.iter().copied()) {
            Some(meant) => format!("`{key}` is not known; did you mean `{meant}`?"),
            None => format!("`{key}` is not known; there are {}", known.join(", ")),
        }),
    }
}

/// Reads a type whose parts are flattened into it, which serde reads without a look at keys that it does not know. The type derives its
/// own `deserialize` with `remote = "Self"`.
macro_rules! keyed {
    ($kind:ty) => {
        impl<'de> serde::Deserialize<'de> for $kind {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<$kind, D::Error> {
                let given = serde_json::Map::<String, serde_json::Value>::deserialize(deserializer)?;
                $crate::api::keys::known::<$kind>(&given).map_err(serde::de::Error::custom)?;
                <$kind>::deserialize(serde_json::Value::Object(given)).map_err(serde::de::Error::custom)
            }
        }

        impl serde::Serialize for $kind {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                <$kind>::serialize(self, serializer)
            }
        }
    };
}

pub(super) use keyed;
