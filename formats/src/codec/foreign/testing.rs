//! Reading the vectors that hold bytes.

use serde_json::Value;

use crate::tensor::Tensor;

/// A tensor as type, shape and bytes in hex.
pub fn tensor(value: &Value) -> Tensor {
    let hex = value["data"].as_str().unwrap();
    Tensor {
        dtype: serde_json::from_value(value["dtype"].clone()).unwrap(),
        shape: serde_json::from_value(value["shape"].clone()).unwrap(),
        data: (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect(),
    }
}
