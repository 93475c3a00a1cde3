//! What the backward makes again instead of keeping it (Chen et al. 2016; selective: Korthikanti et al. 2022), per layer: one word
//! for all, `recompute = "full"`, or ranges, `recompute = [{ layers = "0..4", kind = "full" }]`, beside which nothing is made again.

use crate::error::{Error, Result};
use serde::de::{self, IntoDeserializer, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::ops::Range;

/// What a block makes again in the backward.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing.
    #[default]
    None,
    /// The outputs of operations without weights: attention and activation. No product and no communication again.
    Selective,
    /// All but the block's input: nearly a whole forward again.
    Full,
}

/// The choice for each layer.
#[derive(Clone, PartialEq, Debug)]
pub enum RecomputePlan {
    /// The same for all.
    All(Recompute),
    /// By ranges; nothing beside them.
    Ranges(Vec<RecomputeRange>),
}

/// The choice for some layers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecomputeRange {
    /// First layer and the one after the last: "0..4".
    pub layers: String,
    /// What they make again.
    pub kind: Recompute,
}

impl Default for RecomputePlan {
    fn default() -> Self {
        RecomputePlan::All(Recompute::None)
    }
}

impl RecomputePlan {
    /// The choice for each of `n_layers`. Errors: a range that is none, is outside of the model, or meets another.
    pub fn of_layers(&self, n_layers: usize) -> Result<Vec<Recompute>> {
        let ranges = match self {
            RecomputePlan::All(kind) => return Ok(vec![*kind; n_layers]),
            RecomputePlan::Ranges(ranges) => ranges,
        };
        let mut layers: Vec<Option<usize>> = vec![None; n_layers];
        for (i, range) in ranges.iter().enumerate() {
            let key = format!("train.recompute.{i}.layers = \"{}\"", range.layers);
            let Some(Range { start, end }) = parse(&range.layers) else {
                return Err(Error::recipe(format!("{key} is no range")).remedy("write first..end, e.g. \"0..4\" for the first four"));
            };
            if start >= end || end > n_layers {
                let nearest = if start < n_layers.min(end) { format!("\"{start}..{n_layers}\"") } else { format!("\"0..{n_layers}\"") };
                let wrong = format!("{key} is empty or outside of the layers 0..{n_layers} of the model");
                return Err(Error::recipe(wrong).remedy(format!("set it to {nearest}")));
            }
            for (layer, taken) in layers.iter_mut().enumerate().take(end).skip(start) {
                if let Some(other) = taken.replace(i) {
                    let wrong = format!("{key} has layer {layer}, which is in train.recompute.{other} as well");
                    return Err(Error::recipe(wrong).remedy("let each layer stand in one range"));
                }
            }
        }
        Ok(layers.into_iter().map(|range| range.map_or(Recompute::None, |i| ranges[i].kind)).collect())
    }
}

impl fmt::Display for Recompute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Recompute::None => "none",
            Recompute::Selective => "selective",
            Recompute::Full => "full",
        })
    }
}

impl fmt::Display for RecomputePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecomputePlan::All(kind) => kind.fmt(f),
            RecomputePlan::Ranges(ranges) => {
                let ranges: Vec<String> = ranges.iter().map(|range| format!("{} of layers {}", range.kind, range.layers)).collect();
                f.write_str(&ranges.join(", "))
            }
        }
    }
}

fn parse(text: &str) -> Option<Range<usize>> {
    let (start, end) = text.split_once("..")?;
    Some(start.trim().parse().ok()?..end.trim().parse().ok()?)
}

impl Serialize for RecomputePlan {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            RecomputePlan::All(kind) => kind.serialize(serializer),
            RecomputePlan::Ranges(ranges) => ranges.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for RecomputePlan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = RecomputePlan;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("one of \"none\", \"selective\", \"full\", or a list of { layers, kind }")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<RecomputePlan, E> {
                Recompute::deserialize(text.into_deserializer()).map(RecomputePlan::All)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> std::result::Result<RecomputePlan, A::Error> {
                let mut ranges = Vec::new();
                while let Some(range) = items.next_element()? {
                    ranges.push(range);
                }
                Ok(RecomputePlan::Ranges(ranges))
            }
        }
        deserializer.deserialize_any(Either)
    }
}
