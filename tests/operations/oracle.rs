//! The operations again, as naive f64 formulas with an error bound beside every value. Shares no code with the devices.
//!
//! Bounds: `U` is the unit roundoff of f32. A sum of n products in any order, fused or not, is off by at most
//! n U sum |terms| (Higham 2002, section 3.1, first order); a function of computed values adds the first-order propagation of
//! their bounds. The rounding at a bf16 store is added by the driver.

/// Unit roundoff of f32.
pub const U: f64 = 1.0 / (1u64 << 24) as f64;

// EXP: an exponential in f32 may be off by (4 + |x| / 4) U, relatively; (1 + 1/4) |x| U where x itself was rounded.

/// A value and how far a correct f32 computation may be from it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Near {
    pub value: f64,
    pub bound: f64,
}

pub fn near(value: f64, bound: f64) -> Near {
    Near { value, bound }
}

/// What an E4M3 stands for, by the definition of the format: 4 bits of exponent with bias 7, 3 of mantissa, no leading one when the
/// exponent is 0.
pub fn e4m3(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let size = if exponent == 0 { mantissa * 2f64.powi(-9) } else { (8.0 + mantissa) * 2f64.powi(exponent - 10) };
    let size = if code & 0x7f == 0x7f { f64::NAN } else { size };
    if code & 0x80 == 0 { size } else { -size }
}

/// The code of the nearest number, of two the even one; the largest for all above it. By a search through all.
pub fn nearest_e4m3(x: f64) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return sign | 0x7f;
    }
    let size = x.abs().min(448.0);
    let distance = |code: u8| (e4m3(code) - size).abs();
    let best = (0..=0x7eu8).min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1))));
    sign | best.expect("there are codes")
}

/// Heads as the oracle sees them: query, kv, dim.
pub type HeadCounts = (usize, usize, usize);

/// Columns of query head `a`, of key head `g` and of value head `g`, from the definition: G groups of (A/G queries, key, value).
pub fn query_at((query, kv, d): HeadCounts, a: usize) -> usize {
    let per = query / kv;
    (a / per * (per + 2) + a % per) * d
}
pub fn key_at((query, kv, d): HeadCounts, g: usize) -> usize {
    let per = query / kv;
    (g * (per + 2) + per) * d
}

pub fn gemm(a: &[f64], b: &[f64], old: Option<&[f64]>, (m, n, k): (usize, usize, usize), trans: (bool, bool)) -> Vec<Near> {
    let mut out = Vec::with_capacity(m * n);
    for i in 0..m {
        for j in 0..n {
            let (mut sum, mut size) = (0.0, 0.0);
            for l in 0..k {
                let x = if trans.0 { a[l * m + i] } else { a[i * k + l] };
                let y = if trans.1 { b[j * k + l] } else { b[l * n + j] };
                sum += x * y;
                size += (x * y).abs();
            }
            let start = old.map_or(0.0, |old| old[i * n + j]);
            // vdpbf16ps flushes subnormal products: k times the smallest normal.
            out.push(near(start + sum, (k + 1) as f64 * U * (size + start.abs()) + k as f64 * 1.2e-38));
        }
    }
    out
}

/// a[m, k] b[n, k]^T where a is rounded to a unit before.
pub fn gemm_of_rounded(a: &[Near], b: &[f64], (m, n, k): (usize, usize, usize), unit: f64) -> Vec<Near> {
    let values: Vec<f64> = a.iter().map(|x| x.value).collect();
    let mut out = gemm(&values, b, None, (m, n, k), (false, true));
    for (at, y) in out.iter_mut().enumerate() {
        let off = |x: &Near| x.bound + unit * (x.value.abs() + x.bound);
        y.bound += 1.01 * (0..k).map(|l| off(&a[at / n * k + l]) * b[at % n * k + l].abs()).sum::<f64>();
    }
    out
}

/// (out, stats) of a norm over rows of n.
pub fn norm(x: &[f64], gain: &[f64], bias: Option<&[f64]>, layer: bool, eps: f64) -> (Vec<Near>, Vec<Near>) {
    let n = gain.len();
    let terms = n as f64 + 8.0;
    let (mut out, mut stats) = (Vec::new(), Vec::new());
    for row in x.chunks_exact(n) {
        let size = row.iter().map(|v| v.abs()).sum::<f64>() / n as f64;
        let mean = if layer { row.iter().sum::<f64>() / n as f64 } else { 0.0 };
        let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
        let rstd = 1.0 / (var + eps).sqrt();
        let d_mean = if layer { terms * U * size } else { 0.0 };
        // Subtracting a mean off by d_mean adds d_mean^2 to the variance and U |x| to each difference.
        let largest = row.iter().fold(0.0f64, |a, v| a.max(v.abs())) + mean.abs();
        let d_var = terms * U * (var + eps) + 2.0 * var.sqrt() * U * largest + (d_mean + U * largest).powi(2);
        let d_rstd = 0.5 * rstd.powi(3) * d_var + 4.0 * U * rstd;
        stats.extend([near(mean, d_mean), near(rstd, d_rstd)]);
        for i in 0..n {
            let g = gain[i] + if layer { 1.0 } else { 0.0 };
            let b = bias.map_or(0.0, |b| b[i]);
            let diff = row[i] - mean;
            let bound = g.abs() * (rstd * (d_mean + 2.0 * U * (row[i].abs() + mean.abs())) + diff.abs() * (d_rstd + 4.0 * U * rstd));
            out.push(near(diff * rstd * g + b, bound + 2.0 * U * ((diff * rstd * g).abs() + b.abs()) + U * (diff * rstd).abs()));
        }
    }
    (out, stats)
}

/// (dx, dgain, dbias), each added to what was there. `stats` as given.
pub struct NormGradient {
    pub dx: Vec<Near>,
    pub dgain: Vec<Near>,
    pub dbias: Vec<Near>,
}

/// `old` = (dx, dgain, dbias) before.
pub fn norm_backward(old: (&[f64], &[f64], &[f64]), dy: &[f64], x: &[f64], gain: &[f64], stats: &[f64], layer: bool) -> NormGradient {
    let n = gain.len();
    let n_rows = x.len() / n;
    let row_terms = n_rows as f64 + 8.0;
    let terms = n as f64 + 8.0;
    let start = |old: &[f64]| old.iter().map(|v| near(*v, row_terms * U * v.abs())).collect::<Vec<_>>();
    let mut result = NormGradient { dx: Vec::new(), dgain: start(old.1), dbias: start(old.2) };
    for t in 0..n_rows {
        let (mean, rstd) = (stats[2 * t], stats[2 * t + 1]);
        let (x, dy) = (&x[t * n..][..n], &dy[t * n..][..n]);
        let hat: Vec<f64> = x.iter().map(|v| (v - mean) * rstd).collect();
        let hat_bound: Vec<f64> = x.iter().map(|v| 3.0 * U * rstd * (v.abs() + mean.abs())).collect();
        let g: Vec<f64> = dy.iter().zip(gain).map(|(d, w)| d * (w + if layer { 1.0 } else { 0.0 })).collect();
        let along = g.iter().zip(&hat).map(|(a, b)| a * b).sum::<f64>() / n as f64;
        let along_bound = (0..n).map(|i| g[i].abs() * (hat_bound[i] + terms * U * hat[i].abs())).sum::<f64>() / n as f64;
        let offset = if layer { g.iter().sum::<f64>() / n as f64 } else { 0.0 };
        let offset_bound = if layer { terms * U * g.iter().map(|v| v.abs()).sum::<f64>() / n as f64 } else { 0.0 };
        for i in 0..n {
            let d = rstd * (g[i] - offset - hat[i] * along);
            let size = g[i].abs() + offset.abs() + (hat[i] * along).abs();
            let error = 8.0 * U * size + offset_bound + hat[i].abs() * along_bound + hat_bound[i] * along.abs();
            let before = old.0[t * n + i];
            result.dx.push(near(before + d, rstd * error + 2.0 * U * (before.abs() + d.abs())));
            let (gain, bias) = (&mut result.dgain[i], &mut result.dbias[i]);
            gain.value += dy[i] * hat[i];
            gain.bound += dy[i].abs() * (hat_bound[i] + row_terms * U * hat[i].abs());
            bias.value += dy[i];
            bias.bound += row_terms * U * dy[i].abs();
        }
    }
    result
}

/// Ways to scale rotary frequencies for 8 times as many tokens as the 512 of the first training; Llama 3's and YaRN's ramps as published,
/// of turns 1 to 4 and 1 to 32 within those 512.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Scaled {
    Plain,
    Linear,
    Llama3,
    Yarn,
}

/// Frequency of pair `i` of so many dims of this base, and what cos and sin are multiplied by. By wavelengths, as the papers have it.
fn frequency(scaled: Scaled, i: usize, (dims, base): (usize, f64)) -> (f64, f64) {
    let (factor, old) = (8.0, 512.0);
    let wavelength = 2.0 * std::f64::consts::PI * base.powf((2 * i) as f64 / dims as f64);
    let of = |wavelength: f64| 2.0 * std::f64::consts::PI / wavelength;
    match scaled {
        Scaled::Plain => (of(wavelength), 1.0),
        Scaled::Linear => (of(wavelength * factor), 1.0),
        Scaled::Llama3 if wavelength > old => (of(wavelength * factor), 1.0),
        Scaled::Llama3 if wavelength < old / 4.0 => (of(wavelength), 1.0),
        Scaled::Llama3 => {
            let smooth = (old / wavelength - 1.0) / (4.0 - 1.0);
            ((1.0 - smooth) * of(wavelength) / factor + smooth * of(wavelength), 1.0)
        }
        Scaled::Yarn => {
            // base^(2 d / dims) 2 pi = old / turns, solved for the dim.
            let dim = |turns: f64| (old / (turns * 2.0 * std::f64::consts::PI)).log(base) * dims as f64 / 2.0;
            let (low, high) = (dim(32.0).floor().max(0.0), dim(1.0).ceil().min((dims - 1) as f64));
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            (of(wavelength) * (1.0 - ramp) + of(wavelength * factor) * ramp, 0.1 * factor.ln() + 1.0)
        }
    }
}

/// The packed qkv rotated. Frequencies from the definition; a cosine rounded to f32 is off by U.
pub fn rope(qkv: &[f64], positions: &[f64], heads: HeadCounts, (turning, scaled): ((usize, f64), Scaled), sign: f64) -> Vec<Near> {
    let ((query, kv, d), half) = (heads, turning.0 / 2);
    let columns = (query + 2 * kv) * d;
    let mut out: Vec<Near> = qkv.iter().map(|v| near(*v, 0.0)).collect();
    let frequencies: Vec<(f64, f64)> = (0..half).map(|i| frequency(scaled, i, turning)).collect();
    for (t, position) in positions.iter().enumerate() {
        let rotated = (0..query).map(|a| query_at(heads, a)).chain((0..kv).map(|g| key_at(heads, g)));
        for at in rotated {
            for (i, (frequency, factor)) in frequencies.iter().enumerate() {
                let angle = sign * position * frequency;
                let (at, pair) = (t * columns + at + i, t * columns + at + i + half);
                let (a, b) = (factor * qkv[at], factor * qkv[pair]);
                // The angle itself may be off by a few f64 roundings, relatively; a share of a frequency that is divided by 8, by 8 times
                // as many.
                let bound = (4.0 * U + angle.abs() * 8e-14) * (a.abs() + b.abs());
                out[at] = near(a * angle.cos() - b * angle.sin(), bound);
                out[pair] = near(b * angle.cos() + a * angle.sin(), bound);
            }
        }
    }
    out
}

/// Scaled scores of one query over keys, and the bound of their error.
fn scores(q: &[f64], keys: &[&[f64]]) -> (Vec<f64>, f64) {
    let scale = 1.0 / (q.len() as f64).sqrt();
    let value: Vec<f64> = keys.iter().map(|k| scale * q.iter().zip(*k).map(|(a, b)| a * b).sum::<f64>()).collect();
    let size = keys.iter().map(|k| scale * q.iter().zip(*k).map(|(a, b)| (a * b).abs()).sum::<f64>()).fold(0.0, f64::max);
    (value, (q.len() as f64 + 8.0) * U * size)
}

/// One row of attention over any keys and values: (out row, lse). Weights may be rounded by `p_rounding`, relatively, before they are
/// multiplied with the values.
pub fn attention_row(q: &[f64], keys: &[&[f64]], values: &[&[f64]], p_rounding: f64) -> (Vec<Near>, Near) {
    let (s, s_bound) = scores(q, keys);
    let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let min = s.iter().copied().fold(f64::INFINITY, f64::min);
    let sum: f64 = s.iter().map(|v| (v - max).exp()).sum();
    // exp(s - max): the score's own error twice (max moves too), the subtraction, the exponential (EXP), and n terms of sums.
    let relative = 2.0 * s_bound + 1.25 * U * (max - min) + (keys.len() as f64 + 16.0) * U;
    let mut out = vec![Near::default(); q.len()];
    for (s, v) in s.iter().zip(values) {
        let p = (s - max).exp() / sum;
        for (o, v) in out.iter_mut().zip(*v) {
            o.value += p * v;
            o.bound += p * v.abs() * (2.0 * relative + p_rounding);
        }
    }
    let lse = max + sum.ln();
    (out, near(lse, s_bound + relative + 4.0 * U * lse.abs()))
}

/// (out[T, A*D], lse[A, T]).
pub fn attention(qkv: &[f64], starts: &[usize], heads: HeadCounts, p_rounding: f64) -> (Vec<Near>, Vec<Near>) {
    let (query, kv, d) = heads;
    let columns = (query + 2 * kv) * d;
    let n_tokens = qkv.len() / columns;
    let (mut out, mut lse) = (vec![Near::default(); n_tokens * query * d], vec![Near::default(); query * n_tokens]);
    for ends in starts.windows(2) {
        for t in ends[0]..ends[1] {
            for a in 0..query {
                let at = key_at(heads, a / (query / kv));
                let keys: Vec<&[f64]> = (ends[0]..=t).map(|s| &qkv[s * columns + at..][..d]).collect();
                let values: Vec<&[f64]> = (ends[0]..=t).map(|s| &qkv[s * columns + at + d..][..d]).collect();
                let (row, l) = attention_row(&qkv[t * columns + query_at(heads, a)..][..d], &keys, &values, p_rounding);
                out[(t * query + a) * d..][..d].copy_from_slice(&row);
                lse[a * n_tokens + t] = l;
            }
        }
    }
    (out, lse)
}

/// What the backward pass of attention reads.
pub struct AttentionGradient<'a> {
    pub dout: &'a [f64],
    pub out: &'a [f64],
    pub lse: &'a [f64],
    pub qkv: &'a [f64],
}

/// dqkv. `out` and `lse` as given; weights and gradients of scores may be rounded by `p_rounding`, relatively, before they are
/// multiplied with queries, keys and values.
pub fn attention_backward(inputs: &AttentionGradient, starts: &[usize], heads: HeadCounts, p_rounding: f64) -> Vec<Near> {
    let AttentionGradient { dout, out, lse, qkv } = *inputs;
    let (query, kv, d) = heads;
    let columns = (query + 2 * kv) * d;
    let n_tokens = qkv.len() / columns;
    let mut dqkv = vec![Near::default(); qkv.len()];
    let scale = 1.0 / (d as f64).sqrt();
    let mut add = |at: usize, value: f64, bound: f64| {
        dqkv[at].value += value;
        dqkv[at].bound += bound;
    };
    for ends in starts.windows(2) {
        // Sums run over at most all tokens of the sequence and all queries of a group, and over d inside the scores.
        let terms = ((ends[1] - ends[0]) * query / kv + 16) as f64 * U + p_rounding;
        for t in ends[0]..ends[1] {
            for a in 0..query {
                let (q_at, o_at) = (t * columns + query_at(heads, a), (t * query + a) * d);
                let (q, o, g) = (&qkv[q_at..][..d], &out[o_at..][..d], &dout[o_at..][..d]);
                let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(a, b)| a * b).sum::<f64>();
                let size = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(a, b)| (a * b).abs()).sum::<f64>();
                let l = lse[a * n_tokens + t];
                let (delta, delta_bound) = (dot(g, o), (d + 8) as f64 * U * size(g, o));
                for s in ends[0]..=t {
                    let k_at = s * columns + key_at(heads, a / (query / kv));
                    let (k, v) = (&qkv[k_at..][..d], &qkv[k_at + d..][..d]);
                    let score = scale * dot(q, k);
                    let p = (score - l).exp();
                    let p_error = (d + 8) as f64 * U * scale * size(q, k) + 2.0 * U * (score.abs() + l.abs()) + 8.0 * U;
                    let dp = dot(g, v);
                    let ds = p * (dp - delta) * scale;
                    let spread = dp.abs() + delta.abs();
                    let ds_bound = p * scale * (spread * (p_error + 4.0 * U) + (d + 8) as f64 * U * size(g, v) + delta_bound);
                    for i in 0..d {
                        add(q_at + i, ds * k[i], (ds_bound + terms * ds.abs()) * k[i].abs());
                        add(k_at + i, ds * q[i], (ds_bound + terms * ds.abs()) * q[i].abs());
                        add(k_at + d + i, p * g[i], p * (p_error + terms) * g[i].abs());
                    }
                }
            }
        }
    }
    dqkv
}

/// 1 / (1 + exp(-x)).
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub fn activation(x: &[f64], gated: bool) -> Vec<Near> {
    if !gated {
        return x.iter().map(|v| near(v.max(0.0).powi(2), 2.0 * U * v * v)).collect();
    }
    // EXP, then four roundings.
    let one = |v: &[f64]| (v[0] * sigmoid(v[0]) * v[1], (8.0 + v[0].abs() / 4.0) * U);
    x.chunks_exact(2).map(one).map(|(y, relative)| near(y, relative * y.abs() + 1e-37)).collect()
}

/// Unit roundoff of the type that `round` rounds to: f32 or bf16.
pub fn unit_of(round: &dyn Fn(f64) -> f64) -> f64 {
    if round(1.0 + 2.0 * U) == 1.0 { 1.0 / 256.0 } else { U }
}

/// The activation of products that were stored with this unit roundoff before: what they are off by comes through the derivative, which
/// is at most 2 |x| + error of x^2, and of silu 1.1.
pub fn activation_of_rounded(x: &[Near], gated: bool, unit: f64) -> Vec<Near> {
    let off = |x: &Near| x.bound + unit * (x.value.abs() + x.bound);
    let values: Vec<f64> = x.iter().map(|x| x.value).collect();
    let through: Vec<f64> = if gated {
        let pair = |x: &[Near]| {
            let (gate, up) = (off(&x[0]), off(&x[1]));
            1.1 * gate * (x[1].value.abs() + up) + (x[0].value * sigmoid(x[0].value)).abs() * up
        };
        x.chunks_exact(2).map(pair).collect()
    } else {
        x.iter().map(|x| 2.0 * x.value.abs() * off(x) + off(x).powi(2)).collect()
    };
    activation(&values, gated).iter().zip(through).map(|(y, through)| near(y.value, 1.01 * (y.bound + through))).collect()
}

pub fn activation_backward(dout: &[f64], x: &[f64], gated: bool) -> Vec<Near> {
    if !gated {
        return x.iter().zip(dout).map(|(v, d)| 2.0 * v.max(0.0) * d).map(|y| near(y, 4.0 * U * y.abs())).collect();
    }
    let pair = |(v, d): (&[f64], &f64)| {
        let s = sigmoid(v[0]);
        // x (1 - s) cancels: bound by the size of its parts.
        let size = (d * v[1] * s).abs() * (1.0 + 2.0 * v[0].abs());
        [
            near(d * v[1] * s * (1.0 + v[0] * (1.0 - s)), 16.0 * U * size + 1e-37),
            near(d * v[0] * s, 12.0 * U * (d * v[0] * s).abs() + 1e-37),
        ]
    };
    x.chunks_exact(2).zip(dout).flat_map(pair).collect()
}

/// The same of gradients that were stored with this unit roundoff before: what they are off by comes through as they do, linearly.
pub fn activation_backward_of_rounded(dout: &[Near], x: &[f64], gated: bool, unit: f64) -> Vec<Near> {
    let values: Vec<f64> = dout.iter().map(|d| d.value).collect();
    let off: Vec<f64> = dout.iter().map(|d| d.bound + unit * (d.value.abs() + d.bound)).collect();
    let through = activation_backward(&off, x, gated);
    let all = activation_backward(&values, x, gated).into_iter().zip(through);
    all.map(|(y, through)| near(y.value, 1.01 * (y.bound + through.value.abs() + through.bound))).collect()
}
