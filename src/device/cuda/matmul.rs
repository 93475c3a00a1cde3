//! Matrix products: shapes are checked here. In the shortest way the backend's library multiplies (`gemm`), or on a Hopper GPU the kernels
//! of kernels/matmul_hopper.cu where they take less time, but for few rows, whose time is that of reading the weights once (`few_rows`); in
//! a canonical order of additions the kernels of kernels/matmul.cu do (`multiply_pieces`), on a Hopper GPU those of
//! kernels/matmul_hopper.cu for bf16 (`hopper`).

mod activated;
mod few_rows;
mod hopper;

use super::backend::{Arg, Grid, Kernel, Matrix};
use super::contest::{Contest, Maker};
use super::grid::{CHUNK, int, long};
use super::{Cuda, Workspace};
use crate::device::{Gemm, Store};
use crate::parallel::pieces::pieces;
use crate::tensor::{DType, Tensor};
pub(super) use activated::Way;
use few_rows::is_of_few_rows;

/// A tensor as a matrix: its rows by all of its other dims.
pub(super) fn matrix(x: &Tensor) -> Matrix {
    Matrix { address: Cuda::address(x), rows: x.n_rows(), columns: x.row_len(), dtype: x.dtype() }
}

/// m, n and k of a product, after checking that shapes and types fit.
fn sizes_of((c, a, b): (&Matrix, &Matrix, &Matrix), how: Gemm) -> (usize, usize, usize) {
    let (m, k) = if how.trans_a { (a.columns, a.rows) } else { (a.rows, a.columns) };
    let (k_of_b, n) = if how.trans_b { (b.columns, b.rows) } else { (b.rows, b.columns) };
    assert!(c.rows == m && c.columns == n && k == k_of_b, "gemm {how:?}: {c:?} from {a:?} and {b:?}");
    let same = a.dtype == b.dtype && [DType::F32, DType::BF16].contains(&a.dtype);
    let stored = c.dtype == DType::F32 || c.dtype == DType::BF16 && a.dtype == DType::BF16;
    assert!(same && stored, "gemm: {:?} from {:?} and {:?}", c.dtype, a.dtype, b.dtype);
    (m, n, k)
}

impl Cuda {
    /// See `Device::gemm`.
    pub(super) fn gemm(&self, out: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm) {
        let (c, a, b) = (matrix(out), matrix(a), matrix(b));
        let (m, n, k) = sizes_of((&c, &a, &b), how);
        if m == 0 || n == 0 {
            return;
        }
        if is_of_few_rows((&c, &a, &b), how) {
            let name = format!("gemv_{m}_{}", c.dtype.name());
            self.multiply_few_rows(&name, [c, a, b].map(|x| Arg::Address(x.address)), n, k);
        } else if k > 0 {
            self.multiply_soonest(Product { c, a, b, how, m, n, k });
        } else if how.out == Store::Assign {
            self.backend.zero(c.address, out.n_bytes());
        }
    }

    /// By the library, or on Hopper by the kernels of products in canonical order where they take less time.
    fn multiply_soonest(&self, product: Product) {
        let Product { c, a, b, how, .. } = product;
        let together = match (how.trans_a, how.out) {
            (false, Store::Assign) => Some(Together::InPairs),
            (true, _) if !how.trans_b && c.dtype == DType::F32 => Some(Together::InTurn),
            _ => None,
        };
        let Some(together) = together.filter(|_| self.hopper && product.is_copyable()) else { return self.backend.gemm(c, a, b, how) };
        let n_bytes = c.rows * c.columns * c.dtype.bytes();
        self.contest(product.contest(""), n_bytes, &mut |maker, to| {
            let c = Matrix { address: to.unwrap_or(c.address), ..c };
            match maker {
                Maker::Library => self.backend.gemm(c, a, b, how),
                Maker::Own => self.multiply_on_hopper(Product { c, ..product }, Terms::Equal(1), together),
            }
        });
    }
}

/// Most pieces that kernels/matmul.cu adds in pairs.
pub(super) const MOST_IN_PAIRS: usize = 8;
/// Eight elements of bf16 are fetched at a time where they lie at multiples of so many bytes.
const VECTOR_BYTES: u64 = 16;

/// Which terms of a product belong together.
#[derive(Clone, Copy)]
pub(super) enum Terms<'a> {
    /// So many equal pieces, as `parallel::pieces` cuts them.
    Equal(usize),
    /// Those from one start to the next.
    From(&'a [usize]),
}

/// How the pieces are added.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Together {
    /// ((p0 + p1) + (p2 + p3)) + ..
    InPairs,
    /// out + p0 + p1 + ..
    InTurn,
}

/// A form of the kernels for bf16: `Form` of kernels/matmul.cu.
struct Form {
    name: &'static str,
    rows: usize,
    columns: usize,
    depth: usize,
    threads: u32,
}

const LARGE: Form = Form { name: "whole", rows: 128, columns: 128, depth: 32, threads: 256 };
const LARGE_TURN: Form = Form { name: "turn", ..LARGE };
const WIDE: Form = Form { name: "pairs", columns: 64, ..LARGE };
const SMALL: Form = Form { name: "small", rows: 64, columns: 64, depth: 64, threads: 128 };
const SMALL_TURN: Form = Form { name: "small_turn", ..SMALL };
const FLAT: Form = Form { name: "flat", rows: 16, ..SMALL };
/// Stages of the kernels' pipeline.
const STAGES: usize = 4;

impl Form {
    fn tiles(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.rows) * n.div_ceil(self.columns)
    }

    fn shared_bytes(&self, how: Gemm) -> usize {
        let of = |across: usize, k_outside: bool| if k_outside { self.depth * (across + 8) } else { across * (self.depth + 8) };
        STAGES * (of(self.rows, how.trans_a) + of(self.columns, !how.trans_b)) * DType::BF16.bytes()
    }

    /// For a product of these sizes. All forms give the same bits.
    fn of(together: Together, (m, n): (usize, usize), how: Gemm, n_pieces: usize, processors: usize) -> Form {
        let fills = |form: &Form| form.tiles(m, n) >= processors;
        match together {
            Together::InTurn => {
                if fills(&LARGE_TURN) {
                    LARGE_TURN
                } else {
                    SMALL_TURN
                }
            }
            Together::InPairs if m <= FLAT.rows && !how.trans_a => FLAT,
            Together::InPairs if n_pieces == 1 && !how.trans_a && fills(&LARGE) => LARGE,
            Together::InPairs if fills(&WIDE) => WIDE,
            Together::InPairs => SMALL,
        }
    }
}

/// Into how many parts the pieces of each tile are divided, so that there is work for every processor: subtrees of the pairs, so that
/// nothing but the time depends on it.
pub(super) fn parts(n_pieces: usize, n_tiles: usize, processors: usize) -> usize {
    let mut parts = 1;
    while parts < n_pieces && n_tiles * parts < 2 * processors {
        parts *= 2;
    }
    parts
}

/// A product that has terms.
#[derive(Clone, Copy)]
struct Product {
    c: Matrix,
    a: Matrix,
    b: Matrix,
    how: Gemm,
    m: usize,
    n: usize,
    k: usize,
}

impl Product {
    /// After checking that shapes and types fit.
    fn of(c: Matrix, (a, b): (Matrix, Matrix), how: Gemm) -> Product {
        let (m, n, k) = sizes_of((&c, &a, &b), how);
        Product { c, a, b, how, m, n, k }
    }

    /// What is measured of it, with what its kernel ends in.
    fn contest(&self, end: &'static str) -> Contest {
        let Product { c, how, m, n, k, .. } = *self;
        Contest { layout: layout_name(how), m, n, k, out: c.dtype, adds: how.out == Store::Accumulate, end }
    }
}

fn layout_name(how: Gemm) -> &'static str {
    match (how.trans_a, how.trans_b) {
        (false, true) => "nt",
        (false, false) => "nn",
        (true, false) => "tn",
        (true, true) => panic!("products in canonical order: no operand of a model is transposed twice"),
    }
}

impl Cuda {
    /// out = (or, in turn, +=) the pieces of op(a) op(b) added as `together` says; see `CanonicalSums`.
    pub(super) fn multiply_pieces(&self, out: &mut Tensor, (a, b): (&Tensor, &Tensor), how: Gemm, terms: Terms, together: Together) {
        let (c, a, b) = (matrix(out), matrix(a), matrix(b));
        let (m, n, k) = sizes_of((&c, &a, &b), how);
        let n_pieces = match terms {
            Terms::Equal(n) => n,
            Terms::From(starts) => {
                let ends = (starts.first(), starts.last());
                assert!(ends == (Some(&0), Some(&k)) && starts.is_sorted(), "pieces {starts:?} of {k} terms");
                starts.len() - 1
            }
        };
        let layout = layout_name(how);
        assert!(together == Together::InPairs || c.dtype == DType::F32 && layout == "tn", "gemm in turn {how:?} to {out:?}");
        if m == 0 || n == 0 {
            return;
        }
        if n_pieces == 0 || k == 0 {
            // Sums of nothing; added to something they change nothing.
            if how.out == Store::Assign {
                self.backend.zero(c.address, out.n_bytes());
            }
            return;
        }
        if self.hopper && a.dtype == DType::BF16 {
            return self.multiply_on_hopper(Product { c, a, b, how, m, n, k }, terms, together);
        }
        let processors = self.backend.processors();
        let (kernel, form) = match a.dtype {
            DType::BF16 => {
                let form = Form::of(together, (m, n), how, n_pieces, processors);
                (Kernel::of("matmul", &format!("matmul_{}_{layout}", form.name), DType::BF16), form)
            }
            _ => {
                let name = if together == Together::InTurn { "turn" } else { "pairs" };
                (Kernel::of("matmul", &format!("matmul_{name}"), DType::F32), Form { name, rows: 64, columns: 64, depth: 16, threads: 256 })
            }
        };
        let n_tiles = form.tiles(m, n);
        let n_parts = if together == Together::InPairs { parts(n_pieces, n_tiles, processors) } else { 1 };
        let planes = (n_parts > 1).then(|| self.workspace(n_parts * m * n * size_of::<f32>()));
        let table = match terms {
            Terms::From(starts) if n_pieces > 1 => Some(self.table(&starts.iter().map(|start| int_of(*start)).collect::<Vec<i32>>())),
            _ => None,
        };
        let in_vectors = |x: &Matrix, k_is_inside: bool| {
            let piece_starts = |unit: usize| match terms {
                Terms::Equal(n) => pieces(k, n).iter().all(|piece| piece.start % unit == 0),
                Terms::From(starts) => starts[..n_pieces].iter().all(|start| start % unit == 0),
            };
            x.address % VECTOR_BYTES == 0 && x.columns % CHUNK == 0 && (!k_is_inside || piece_starts(CHUNK))
        };
        let vectors = [in_vectors(&a, !how.trans_a), in_vectors(&b, how.trans_b)].map(|yes| int(usize::from(yes)));
        let is_bf16 = c.dtype == DType::BF16 && planes.is_none();
        let to = planes.as_ref().map_or(Arg::Address(c.address), Workspace::arg);
        let accumulate = together == Together::InTurn && how.out == Store::Accumulate;
        let mut args = vec![to, int(usize::from(is_bf16)), int(usize::from(accumulate)), Arg::Address(a.address), Arg::Address(b.address)];
        args.extend([int(m), int(n), vectors[0], vectors[1], table.as_ref().map_or(Arg::Address(0), Workspace::arg)]);
        args.extend([k, n_pieces, if together == Together::InTurn { n_pieces } else { n_pieces / n_parts }].map(int));
        let mut shared_bytes = form.shared_bytes(how);
        if a.dtype == DType::F32 {
            args.extend([how.trans_a, how.trans_b].map(|is| int(usize::from(is))));
            shared_bytes = 2 * form.depth * (form.rows + 4) * size_of::<f32>();
        }
        let line = Grid::line(n_tiles, form.threads);
        let grid = Grid { blocks: (line.blocks.0, 1, n_parts as u32), shared_bytes: shared_bytes as u32, ..line };
        self.backend.launch(&kernel, grid, &args);
        if let Some(planes) = planes {
            let args = [Arg::Address(c.address), planes.arg(), int(n_parts), long(m * n)];
            self.backend.launch(&Kernel::of("matmul", "matmul_add", c.dtype), self.flat(m * n), &args);
        }
    }
}

fn int_of(x: usize) -> i32 {
    i32::try_from(x).unwrap_or_else(|_| panic!("{x} terms are more than a kernel counts"))
}
