//! What there is to compute on.

use kernels::{Cpu, Memory, cuda};
use serde::Serialize;

/// One GPU.
#[derive(Clone, Debug, Serialize)]
pub struct Gpu {
    /// What `--device` calls it.
    pub device: String,
    /// Its name.
    pub name: String,
    /// Compute capability, as 9.0.
    pub capability: String,
    /// Bytes of memory.
    pub memory: u64,
    /// Why it cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unusable: Option<String>,
}

/// Everything that can compute.
#[derive(Clone, Debug, Serialize)]
pub struct Devices {
    /// The CPU, with its threads and instruction set.
    pub cpu: String,
    /// NVIDIA GPUs.
    pub gpus: Vec<Gpu>,
    /// Why there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_gpu: Option<String>,
}

/// Looks for them.
pub fn devices() -> Devices {
    let cpu = Cpu::default().name();
    let cards = match cuda::cards() {
        Ok(cards) => cards,
        Err(error) => return Devices { cpu, gpus: Vec::new(), no_gpu: Some(error.to_string()) },
    };
    let missing = cuda::missing();
    let gpus = cards.into_iter().map(|card| Gpu {
        device: format!("cuda:{}", card.ordinal),
        capability: format!("{}.{}", card.capability / 10, card.capability % 10),
        memory: card.memory,
        unusable: card.unusable.or_else(|| missing.clone()),
        name: card.name,
    });
    Devices { cpu, gpus: gpus.collect(), no_gpu: None }
}

impl Devices {
    /// The same for people.
    pub fn text(&self) -> String {
        let mut text = format!("cpu     {}\n", self.cpu);
        for Gpu { device, name, capability, memory, unusable } in &self.gpus {
            let gigabytes = *memory as f64 / (1u64 << 30) as f64;
            text += &format!("{device}  {name}, compute capability {capability}, {gigabytes:.1} GiB");
            text += &unusable.as_ref().map(|why| format!("; not usable: {why}")).unwrap_or_default();
            text.push('\n');
        }
        if let Some(why) = &self.no_gpu {
            text += &format!("cuda    {why}\n");
        }
        text
    }
}
