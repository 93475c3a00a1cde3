//! What the backward makes again instead of keeping it (Chen et al. 2016; selective: Korthikanti et al. 2022), per layer.

/// What a block makes again in the backward.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
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
