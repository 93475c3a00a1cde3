//! int8: integers against their definition, products against f64, ranks, and values that are hard to round.

use super::*;

/// round(x / scale) of numbers whose largest has size 127 scales: the definition, one number at a time.
fn rounded(x: &[f32], size: f32) -> (Vec<i32>, f32) {
    let scale = size / 127.0;
    if scale < f32::MIN_POSITIVE {
        return (vec![0; x.len()], 0.0);
    }
    let integer = |x: &f32| {
        let quotient = x / scale;
        let (below, fraction) = (quotient.floor(), quotient - quotient.floor());
        let up = fraction > 0.5 || (fraction == 0.5 && below.rem_euclid(2.0) == 1.0);
        (below as i32 + i32::from(up)).clamp(-127, 127)
    };
    (x.iter().map(integer).collect(), scale)
}

fn size(x: &[f32]) -> f32 {
    x.iter().fold(0f32, |most, x| most.max(x.abs()))
}

fn packed(device: &dyn Device, w: &Tensor, n_pieces: usize) -> PackedWeight {
    let mut sizes = poisoned(&[w.n_rows()], DType::F32);
    packing(device).sizes(&mut sizes, w);
    packing(device).pack_int8(w, &sizes, n_pieces).unwrap()
}

/// Of x[m, k] W^T: the product of the rounded operands, and its bound, and what rounding the operands can make of the exact product.
struct Exact {
    of_integers: f64,
    bound: f64,
    of_numbers: f64,
    rounding: f64,
}

/// In f64 from the definition. A piece's sum is rounded once when it becomes an f32 and once by each scale, then at most 3 times in
/// pairs: 6 u of the sizes to first order, u = 2^-24, and what is under 2^-126 is off by 2^-149.
/// Rounding the operands: each is off by half its scale, (and 4 u of its size: the scale and the quotient are rounded).
fn exact(x: &[f32], w: &[f32], w_size: f32, n_pieces: usize) -> Exact {
    let u = 2f64.powi(-24);
    let (integers_w, scale_w) = rounded(w, w_size);
    let mut all = Exact { of_integers: 0.0, bound: 1e-40, of_numbers: 0.0, rounding: 1e-40 };
    for piece in pieces(x.len(), n_pieces).into_iter().filter(|piece| !piece.is_empty()) {
        let x_size = size(&x[piece.clone()]);
        let (integers_x, scale_x) = rounded(&x[piece.clone()], x_size);
        let sum: i64 = integers_x.iter().zip(&integers_w[piece.clone()]).map(|(x, w)| i64::from(*x) * i64::from(*w)).sum();
        let value = sum as f64 * f64::from(scale_w) * f64::from(scale_x);
        all.of_integers += value;
        all.bound += 6.01 * u * value.abs();
        // Where all count as 0, each is off by its size.
        let off = |scale: f32, size: f32| if scale == 0.0 { f64::from(size) } else { 0.5 * f64::from(scale) + 4.0 * u * f64::from(size) };
        let (off_x, off_w) = (off(scale_x, x_size), off(scale_w, w_size));
        for (x, w) in x[piece.clone()].iter().zip(&w[piece]) {
            let (x, w) = (f64::from(*x), f64::from(*w));
            all.of_numbers += x * w;
            all.rounding += x.abs() * off_w + w.abs() * off_x + off_x * off_w;
        }
    }
    all
}

fn check(device: &dyn Device, x: (&[f32], usize), w: &Tensor, n_pieces: usize, what: &str) {
    let (k, n, m) = (w.row_len(), w.n_rows(), x.1);
    let found = multiply(device, &Tensor::from_f32(&[m, k], x.0), &packed(device, w, n_pieces), DType::F32);
    let w = w.to_f32_vec();
    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
        let (x, w) = (&x.0[i * k..][..k], &w[j * k..][..k]);
        let (exact, found) = (exact(x, w, size(w), n_pieces), f64::from(found.f32()[i * n + j]));
        let Exact { of_integers, bound, of_numbers, rounding } = exact;
        assert!((found - of_integers).abs() <= bound, "{what} [{i}, {j}]: {found} for {of_integers} +- {bound}");
        assert!((found - of_numbers).abs() <= rounding + bound, "{what} [{i}, {j}]: {found} for {of_numbers} +- {rounding}");
    }
}

/// The product of the rounded operands but for the rounding of f32, and the exact one but for that of the operands; the second bound is
/// of use: it is a small part of the sizes of the terms.
#[test]
fn products_of_int8_are_those_of_f64() {
    for isa in ISAS {
        let device = Cpu::with_isa(isa);
        for ((m, n, k), n_pieces) in SHAPES.into_iter().flat_map(|shape| [1, 2, 8].map(|n_pieces| (shape, n_pieces))) {
            let w = Tensor::from_f32(&[n, k], &values("w", n * k));
            check(&device, (&values("x", m * k), m), &w, n_pieces, &format!("{isa:?} {m} x {n} x {k}, {n_pieces}"));
        }
        let (x, w) = (values("x", 768), values("w", 768));
        let exact = exact(&x, &w, size(&w), 8);
        let sizes: f64 = x.iter().zip(&w).map(|(x, w)| f64::from((x * w).abs())).sum();
        assert!(exact.rounding < 0.35 * sizes, "{} of {sizes}", exact.rounding);
    }
}

/// Rows of zeros, one huge number among small ones, numbers that become 127 and -127 all through (the largest sums), ties between two
/// integers, numbers too small for a scale, and lengths that fill no word.
#[test]
fn hard_numbers_are_rounded_as_defined() {
    let k = 100;
    let with = |f: &dyn Fn(usize) -> f32| (0..k).map(f).collect::<Vec<f32>>();
    let rows: Vec<(&str, Vec<f32>)> = vec![
        ("zeros", vec![0.0; k]),
        ("an outlier", with(&|i| if i == 37 { -3e8 } else { (i as f32 - 50.0) * 1e-3 })),
        ("all 127", vec![5.0; k]),
        ("all -127", vec![-5.0; k]),
        ("both", with(&|i| if i % 2 == 0 { 127.0 } else { -127.0 })),
        ("ties", with(&|i| if i % 25 == 0 { 127.0 } else { i as f32 / 2.0 - 25.0 })),
        ("subnormal", with(&|i| f32::from_bits(1 + i as u32))),
        ("under a scale", with(&|i| (i as f32 - 50.0) * 1e-38)),
        ("large", with(&|i| if i % 3 == 0 { 1e27 } else { -1e27 })),
    ];
    for isa in ISAS {
        let device = Cpu::with_isa(isa);
        for (w_name, w) in rows.iter().filter(|(name, _)| *name != "large") {
            for (x_name, x) in &rows {
                for n_pieces in [1, 8] {
                    let w = Tensor::from_f32(&[1, k], w);
                    check(&device, (x, 1), &w, n_pieces, &format!("{isa:?}: {x_name} x {w_name}, {n_pieces}"));
                }
            }
        }
    }
}

/// What is not a number does not become one: the elements of its row are not finite, those of other rows are as without it. And
/// numbers are read back from the table as integer times scale.
#[test]
fn what_is_not_finite_stays_so() {
    for isa in ISAS {
        let device = Cpu::with_isa(isa);
        let (m, n, k) = (5, 40, 64);
        let w = Tensor::from_f32(&[n, k], &values("w", n * k));
        let weight = packed(&device, &w, 8);
        let good = values("x", m * k);
        let clean = bits(&multiply(&device, &Tensor::from_f32(&[m, k], &good), &weight, DType::F32));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = good.clone();
            x[2 * k + 9] = bad;
            let found = multiply(&device, &Tensor::from_f32(&[m, k], &x), &weight, DType::F32);
            for (row, (found, clean)) in found.f32().chunks(n).zip(clean.chunks(n)).enumerate() {
                let is_clean = found.iter().map(|x| x.to_bits()).eq(clean.iter().copied());
                assert!(if row == 2 { found.iter().all(|x| !x.is_finite()) } else { is_clean }, "{isa:?}: {bad} in row 2, row {row}");
            }
            let mut sizes = poisoned(&[n], DType::F32);
            let mut values = w.to_f32_vec();
            values[7 * k + 3] = bad;
            packing(&device).sizes(&mut sizes, &Tensor::from_f32(&[n, k], &values));
            assert!(sizes.f32().iter().enumerate().all(|(row, size)| size.is_finite() == (row != 7)), "{isa:?}: {bad}");
        }
        let mut out = poisoned(&[n, k], DType::F32);
        let tokens: Vec<u32> = (0..n as u32).collect();
        packing(&device).look_up(&mut out, &Tensor::from_u32(&[n], &tokens), &weight, 0);
        for (found, w) in out.f32().chunks(k).zip(w.f32().chunks(k)) {
            let (integers, scale) = rounded(w, size(w));
            assert!(found.iter().zip(&integers).all(|(found, integer)| *found == *integer as f32 * scale), "{isa:?}");
        }
    }
}

/// The same bits alone and among 1 to 40 other rows, and on every processor: integers are summed exactly and scaled in one order.
#[test]
fn a_row_of_int8_depends_on_nothing_else() {
    let (most, n, k) = (41, 75, 333);
    for dtype in [DType::F32, DType::BF16] {
        let mut first: Option<Vec<u32>> = None;
        for isa in ISAS {
            let device = Cpu::with_isa(isa);
            let (x, w) = (values("x", most * k), tensor(dtype, &[n, k], &values("w", n * k)));
            let weight = packed(&device, &w, TP_PIECES);
            let product = |rows: std::ops::Range<usize>| {
                let x = tensor(dtype, &[rows.len(), k], &x[rows.start * k..rows.end * k]);
                bits(&multiply(&device, &x, &weight, DType::F32))
            };
            let alone: Vec<Vec<u32>> = (0..most).map(|row| product(row..row + 1)).collect();
            for m in 1..=most {
                let at = (most - m) / 2;
                assert_eq!(product(at..at + m), alone[at..at + m].concat(), "{isa:?} {dtype:?}: {m} rows");
            }
            let all = alone.concat();
            assert!(*first.get_or_insert_with(|| all.clone()) == all, "{isa:?} {dtype:?}");
        }
    }
}

/// A checkpoint with a weight that is not finite is refused by name on the ranks that hold it, and nobody waits for them.
#[test]
fn a_weight_that_is_not_finite_is_refused() {
    let config = model(false);
    let layout = ParallelLayout { tp: 2, pp: 1, dp: 1, vp: 1 };
    let results = threads::run(2, |world: Box<dyn Communicator>| {
        let (groups, device) = (Groups::new(world, layout), Cpu::new());
        let mut chunk = Chunk::new(&device, &config, &layout, groups.at, 0, DType::F32, Purpose::Inference).unwrap();
        chunk.initialise(&device, 3);
        let name = "layers.2.mlp.down.weight";
        if groups.at.tp == 1 {
            let mut params = chunk.params_mut();
            params.iter_mut().find(|param| param.spec.name == name).unwrap().value.f32_mut()[5] = f32::NAN;
        }
        chunk.pack(&device, &*groups.tp, WeightFormat::Int8).map_err(|error| error.to_string())
    });
    for result in results {
        let error = result.unwrap_err();
        assert!(error.contains("int8: layers.2.mlp.down.weight has ") && error.contains("in it"), "{error}");
    }
}
