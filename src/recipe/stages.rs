//! The division of layers over pipeline stages in a recipe: absent, evenly; `layers = [3, 4, 4, 1]`, these, in model order (stage by
//! stage, with several chunks a stage around them again and again); `layers = "auto"`, balanced, with the head weighed by its
//! products; `layers = { embedding = 0.5, head = 2.0 }`, balanced, with these weighed as so many layers.

use super::Pretrain;
use crate::error::{Error, Result};
use crate::parallel::stages::Stages;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// How layers are divided.
#[derive(Clone, PartialEq, Debug)]
pub enum Layers {
    /// Balanced by the operations of layers and head.
    Auto,
    /// Balanced by these weights.
    Weighed(EndWeights),
    /// Given.
    List(Vec<usize>),
}

/// What the ends of the model weigh, in layers.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndWeights {
    /// The embedding, on the first stage.
    pub embedding: f64,
    /// Final norm and output layer, on the last.
    pub head: f64,
}

impl Pretrain {
    /// Layers of each chunk. Errors: they do not divide, do not add up, or are too few.
    pub fn stages(&self) -> Result<Stages> {
        let (pp, vp, n_layers) = (self.parallel.pp, self.parallel.vp, self.model.n_layers);
        let weights = match &self.parallel.layers {
            None => return Ok(Stages::of(vec![n_layers / (pp * vp); pp * vp])),
            Some(Layers::List(counts)) => return self.given_stages(counts),
            Some(Layers::Auto) => EndWeights { embedding: 0.0, head: self.head_in_layers() },
            Some(Layers::Weighed(weights)) => *weights,
        };
        for (key, weight) in [("embedding", weights.embedding), ("head", weights.head)] {
            if !(0.0..1e6).contains(&weight) {
                let wrong = format!("parallel.layers.{key} = {weight}");
                return Err(Error::recipe(wrong).remedy("give what it weighs in layers, 0 or a positive number"));
            }
        }
        let inner = (pp * vp).saturating_sub(2);
        if n_layers < inner {
            let wrong = format!(
                "model.n_layers = {n_layers} leave some of the {inner} inner chunks of parallel.pp x parallel.vp = {pp} x {vp} empty"
            );
            return Err(Error::recipe(wrong).remedy(format!("set parallel.pp to at most {}", ((n_layers + 2) / vp).max(1))));
        }
        Ok(Stages::balanced(pp, vp, n_layers, weights.embedding, weights.head))
    }

    fn given_stages(&self, counts: &[usize]) -> Result<Stages> {
        let (pp, vp, n_layers) = (self.parallel.pp, self.parallel.vp, self.model.n_layers);
        let offer = || {
            let mut counts = counts.to_vec();
            counts.resize(pp * vp, n_layers / (pp * vp));
            format!("set parallel.layers = {:?}", nearest_sum(counts, n_layers))
        };
        if counts.len() != pp * vp {
            let wrong = format!("parallel.layers has {} numbers for parallel.pp x parallel.vp = {pp} x {vp} chunks", counts.len());
            return Err(Error::recipe(wrong).remedy(offer()));
        }
        let sum: usize = counts.iter().sum();
        if sum != n_layers {
            let wrong = format!("parallel.layers = {counts:?} adds up to {sum}, model.n_layers is {n_layers}");
            return Err(Error::recipe(wrong).remedy(offer()));
        }
        // The ends have the embedding and the head to compute.
        let inner = counts.iter().enumerate().skip(1).take((pp * vp).saturating_sub(2));
        if let Some((number, _)) = inner.into_iter().find(|&(_, &n)| n == 0) {
            let wrong = format!("parallel.layers = {counts:?} leaves chunk {number} empty");
            return Err(Error::recipe(wrong).remedy("give it a layer; only the first and the last chunk can do without"));
        }
        Ok(Stages::of(counts.to_vec()))
    }

    /// Products of the output layer over those of a layer, forward or backward alike. The embedding is a look-up.
    fn head_in_layers(&self) -> f64 {
        let (model, seq_len) = (&self.model, self.batch.seq_len);
        let per_token = |n_layers: usize| crate::model::config::ModelConfig { n_layers, ..model.clone() }.train_flops(1, seq_len);
        let layer = per_token(2) - per_token(1);
        (per_token(1) - layer) / layer
    }
}

/// The counts changed as little as possible, at their largest or smallest, so that they add up to `sum`.
fn nearest_sum(mut counts: Vec<usize>, sum: usize) -> Vec<usize> {
    while counts.iter().sum::<usize>() > sum {
        *counts.iter_mut().max().expect("more than nothing") -= 1;
    }
    while counts.iter().sum::<usize>() < sum {
        *counts.iter_mut().min().expect("at least one chunk") += 1;
    }
    counts
}

impl Serialize for Layers {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Layers::Auto => serializer.serialize_str("auto"),
            Layers::Weighed(weights) => weights.serialize(serializer),
            Layers::List(counts) => counts.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Layers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Layers;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"auto\", a list of whole numbers, or { embedding, head }")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<Layers, E> {
                if text == "auto" { Ok(Layers::Auto) } else { Err(E::unknown_variant(text, &["auto"])) }
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> std::result::Result<Layers, A::Error> {
                let mut counts = Vec::new();
                while let Some(count) = items.next_element()? {
                    counts.push(count);
                }
                Ok(Layers::List(counts))
            }
            fn visit_map<A: MapAccess<'de>>(self, entries: A) -> std::result::Result<Layers, A::Error> {
                EndWeights::deserialize(MapAccessDeserializer::new(entries)).map(Layers::Weighed)
            }
        }
        deserializer.deserialize_any(Either)
    }
}
