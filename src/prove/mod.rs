//! Proof, on a user's own machines, that what a job computes there is what one rank computes, or what another program does:
//! a recipe, scaled down in layers, trained for a few steps in its layout and on one rank (`layouts`); the gradients of a batch by a
//! checkpoint, written under Hugging Face names and compared with those of a file (`gradients`). Both end in a [`table::Table`].
//! It knows the training steps and the door to Hugging Face, and nothing of how ranks are started.
//!
//! # What may differ
//!
//! With numerics.mode = "reproducible" nothing: every bit is compared. Else sums are added in other orders, and what may come of that
//! is estimated here, relative to the tensor's norm |b|: |a - b| / |b| <= tolerance. u is the unit roundoff, 2^-24 of f32 and 2^-9 of
//! bf16.
//!
//! A sum of n terms, each addition rounded in no particular direction, is off by u sqrt(n) of its terms' size (Higham and Mary, "A new
//! approach to probabilistic rounding error analysis", 2019); an element of a gradient is what d operations one after another leave,
//! whose errors add up as a walk does, so that sqrt(d) of them remain. With n the longest sum (of hidden, feed-forward, padded vocabulary
//! and tokens of the step) and d = 2 (6 L + 3) operations forward and backward through L layers (two norms, four products, and
//! embedding, final norm and head), in f32
//!
//! tolerance = k u sqrt(n d), k = 4: two computations, each within three times its expected error (3 sqrt(2), rounded).
//!
//! In bf16 each operation rounds its result to bf16 as well, and a product that tp ranks share rounds tp parts:
//!
//! tolerance = k (u_bf16 sqrt(tp d) + u_f32 sqrt(n d)).
//!
//! With numerics.linear = "fp8" what differs in the last bits of f32 or bf16 is rounded to E4M3 (u_8 = 2^-4) at the door of each of 8
//! products of a layer. A relative difference of r puts an element on the other side of a rounding with a chance of about r / 2^-3 and
//! moves it by up to 2^-3 then, so a root mean square of sqrt(r / 8) comes out: 1e-6 has become 3e-2 after three roundings, which is
//! nearly what two independent ones differ by, u_8 sqrt(2/3). That is taken for all 8 L of them:
//!
//! tolerance = (as above) + k u_8 sqrt(2/3 8 L).
//!
//! This finds gross errors only; the sharp proof of FP8 is reproducible, where every bit must be equal.
//!
//! Weights: AdamW moves an element by at most about lr, by the sign of its gradient where that is large against eps. With a gradient
//! that is off by dg = tolerance times its root mean square, an element with |g| > dg moves otherwise by lr dg / |g|, one with
//! |g| < dg by up to 2 lr; over a bell curve of gradients that makes a root mean square below 2 lr sqrt(tolerance). So after s steps, n
//! elements of weights, compared as they are stored (u), may differ by 2 s lr sqrt(tolerance n) + u |b|. Weights that differ by that are
//! in each of the d operations of the next step another rounding, of the size of 2 s lr sqrt(tolerance) over init_std: sqrt(d) of it is
//! what the tolerance of step s + 1 grows by. Where lr is large against the weights, as in the first steps of tiny models, these
//! bounds are wide; the sharp test of fast numerics is the first step, and the sharp test of all steps is reproducible.

pub mod gradients;
pub mod joined;
pub mod layouts;
mod scaled;
pub mod steps;
pub mod table;
pub mod tolerance;
