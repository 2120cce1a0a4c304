//! What compressed-tensors has runtimes do to activations, so that stored weights mean something only together with it.

use serde_json::Value;

use super::reader::declaration;
use crate::error::{Error, Result};

/// Fails for a config.json that has runtimes rotate activations as they run, or replace experts: the stored weights alone are
/// another model's. Rotations that were fused into the weights (`weight_input`, `weight_output`) need nothing more.
pub fn check_run_time(config_json: &Value) -> Result<()> {
    let Some(config) = declaration(config_json).and_then(Value::as_object) else { return Ok(()) };
    let said = |key: &str| config.get(key).filter(|value| !is_empty(value));
    if let Some(transforms) = said("transform_config") {
        let Some(groups) = transforms.get("config_groups").and_then(Value::as_object) else {
            return Err(Error::mismatch(
                "quantization_config.transform_config",
                "an object with config_groups",
                transforms,
            ));
        };
        for (name, group) in groups {
            let Some(places) = group.get("apply").and_then(Value::as_array) else {
                let what = format!("quantization_config.transform_config.config_groups.{name}");
                return Err(Error::mismatch(what, "an object with a list apply", group));
            };
            let location =
                |place: &Value| place.get("location").and_then(Value::as_str).unwrap_or("nowhere").to_owned();
            let mut locations = places.iter().map(location);
            if let Some(location) = locations.find(|at| !matches!(&at[..], "weight_input" | "weight_output")) {
                return Err(Error::unsupported(format!(
                    "quantization_config.transform_config has runtimes rotate activations (`{name}`, at {location}), without which the \
                     stored weights are another model's, and such checkpoints are not read; take the model it was made from, or one \
                     whose rotations are all fused into its weights"
                )));
            }
        }
    }
    match said("moe_sparsity_config") {
        None => Ok(()),
        Some(_) => Err(Error::unsupported(
            "quantization_config.moe_sparsity_config says that experts of each layer were taken out or replaced, and such checkpoints are \
             not read; take the model it was made from",
        )),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(object) => object.values().all(is_empty),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(config: Value) -> Result<()> {
        check_run_time(&json!({"model_type": "llama", "quantization_config": config}))
    }

    fn at(location: &str) -> Value {
        json!({"config_groups": {"R": {"type": "hadamard", "apply": [
            {"targets": ["Linear"], "location": "weight_input"}, {"targets": ["Linear"], "location": location},
        ]}}})
    }

    #[test]
    fn only_rotations_at_run_time_are_refused() {
        for transforms in [json!(null), json!({}), json!({"config_groups": {}}), at("weight_output")] {
            check(json!({"config_groups": {}, "transform_config": transforms})).unwrap();
        }
        for location in ["input", "output", "q_attn", "k_cache"] {
            let told = check(json!({ "transform_config": at(location) })).unwrap_err().to_string();
            assert!(told.contains(&format!("(`R`, at {location})")) && told.contains("take the model"), "{told}");
        }
        let told = check(json!({"transform_config": ["R1"]})).unwrap_err().to_string();
        assert!(told.contains("transform_config") && told.contains("config_groups"), "{told}");
        let told = check(json!({"transform_config": {"config_groups": {"R": {"apply": {}, "x": 1}}}})).unwrap_err();
        assert!(told.to_string().contains("config_groups.R"), "{told}");
    }

    #[test]
    fn experts_that_were_replaced_are_refused() {
        check(json!({"moe_sparsity_config": null})).unwrap();
        let told = check(json!({"moe_sparsity_config": {"method": "novice", "num_experts": [4]}})).unwrap_err();
        assert!(told.to_string().contains("moe_sparsity_config"), "{told}");
    }
}
