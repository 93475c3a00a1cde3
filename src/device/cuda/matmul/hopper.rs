//! Products of bf16 in canonical order on Hopper's own instructions (kernels/matmul_hopper.cu): every product of a Hopper GPU, so that
//! no element's bits depend on which kernel made it. Operands that the copy engine cannot take as they lie are copied to ones it can.

use super::{Product, Terms, Together, int_of, layout_name, parts};
use crate::device::Store;
use crate::device::cuda::backend::{Arg, Grid, Kernel, Matrix, TensorMap};
use crate::device::cuda::grid::{CHUNK, int, long};
use crate::device::cuda::{Cuda, Workspace};
use crate::parallel::pieces::pieces;
use crate::tensor::DType;

/// Terms of a step: `DEPTH` of the kernels.
const DEPTH: usize = 64;
/// Terms of an instruction.
const INSTRUCTION: usize = 16;
/// What addresses and rows of a matrix must be multiples of, in bytes.
const UNIT_BYTES: u64 = 16;
/// Room to begin shared memory at a multiple of 1024 bytes.
const ALIGNMENT: usize = 1024;
const BARRIER_BYTES: usize = 8;
const WARPGROUP: usize = 128;
/// Threads of a block that copies an operand.
const SPACE_THREADS: u32 = 256;

/// A form of the kernels: `Form` of kernels/matmul_hopper.cu.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Form {
    name: &'static str,
    consumers: usize,
    columns: usize,
    stages: usize,
    /// Blocks that work beside each other on tiles below each other.
    cluster: usize,
    /// Of a step of a tile, on paper; of the wide one an eighth more, for it would want all that L2 and an SM's port can do.
    clocks: usize,
    /// Sums of each thread that wait in shared memory.
    waiting: usize,
}

const LARGE: Form = Form { name: "whole", consumers: 2, columns: 256, stages: 4, cluster: 2, clocks: 1024, waiting: 0 };
const LARGE_TURN: Form = Form { name: "turn", ..LARGE };
const WIDE: Form = Form { name: "pairs", consumers: 2, columns: 128, stages: 4, cluster: 2, clocks: 576, waiting: 96 };
const SMALL: Form = Form { name: "small", consumers: 1, columns: 64, stages: 12, cluster: 1, clocks: 341, waiting: 48 };
const SMALL_TURN: Form = Form { name: "small_turn", waiting: 0, ..SMALL };

impl Form {
    fn rows(&self) -> usize {
        64 * self.consumers
    }

    /// Whole clusters of them.
    fn tiles(&self, (m, n): (usize, usize)) -> usize {
        m.div_ceil(self.rows()).next_multiple_of(self.cluster) * n.div_ceil(self.columns)
    }

    /// Most blocks that run at a time, whole clusters.
    fn most_blocks(&self, processors: usize) -> usize {
        (processors / self.cluster).max(1) * self.cluster
    }

    fn shared_bytes(&self) -> usize {
        let stage = (self.rows() + self.columns) * DEPTH * DType::BF16.bytes() + 2 * BARRIER_BYTES;
        self.stages * stage + self.waiting * self.consumers * WARPGROUP * size_of::<f32>() + ALIGNMENT
    }

    /// Into how many parts the pieces of a tile are divided.
    fn parts(&self, together: Together, out: (usize, usize), n_pieces: usize, processors: usize) -> usize {
        if together == Together::InPairs { parts(n_pieces, self.tiles(out), processors) } else { 1 }
    }

    /// The fastest on paper for a product of these sizes, the largest of those. All give the same bits.
    fn of(together: Together, out: (usize, usize), trans_a: bool, n_pieces: usize, processors: usize) -> Form {
        let forms: &[Form] = match together {
            Together::InTurn => &[LARGE_TURN, SMALL_TURN],
            Together::InPairs if n_pieces == 1 && !trans_a => &[LARGE, WIDE, SMALL],
            Together::InPairs => &[WIDE, SMALL],
        };
        let clocks = |form: &&Form| {
            let parts = form.parts(together, out, n_pieces, processors);
            (form.tiles(out) * parts).div_ceil(form.most_blocks(processors)) * form.clocks * (n_pieces / parts)
        };
        *forms.iter().min_by_key(clocks).expect("there are forms for everything")
    }
}

/// Where pieces begin, and the end of the last.
fn bounds(terms: Terms, k: usize) -> Vec<usize> {
    match terms {
        Terms::Equal(n) => pieces(k, n).iter().map(|piece| piece.start).chain([k]).collect(),
        // Nothing is added for a piece without terms.
        Terms::From(starts) => {
            let mut bounds = starts.to_vec();
            bounds.dedup();
            bounds
        }
    }
}

/// The terms of both operands as the kernel sees them.
struct Spacing {
    /// Where pieces begin and end in the operands as given.
    from: Vec<usize>,
    /// And after they were copied, if they must be.
    to: Option<Vec<usize>>,
    /// Pieces are those of `parallel::pieces`, before and after: no table says where they are.
    equal: bool,
}

impl Spacing {
    /// Every piece but the last must fill its instructions, and terms that lie side by side must fill units of the copy engine.
    fn of(terms: Terms, k: usize, a_side_by_side: bool, b_side_by_side: bool) -> Spacing {
        let from = bounds(terms, k);
        let lengths: Vec<usize> = from.windows(2).map(|ends| ends[1] - ends[0]).collect();
        let fill = lengths[..lengths.len() - 1].iter().all(|length| length % INSTRUCTION == 0);
        let as_they_are = fill && (k % CHUNK == 0 || !a_side_by_side && !b_side_by_side);
        let equal = matches!(terms, Terms::Equal(_)) || lengths.len() == 1;
        let room = |length: usize| length.next_multiple_of(INSTRUCTION);
        let most = room(lengths.iter().copied().max().unwrap_or(0));
        let spaced = || lengths.iter().scan(0, |at, length| (*at += if equal { most } else { room(*length) }, Some(*at)).1);
        let to = (!as_they_are).then(|| std::iter::once(0).chain(spaced()).collect());
        Spacing { from, to, equal }
    }

    fn k(&self) -> usize {
        *self.to.as_ref().unwrap_or(&self.from).last().expect("an end")
    }

    fn n_pieces(&self) -> usize {
        self.from.len() - 1
    }
}

/// The pieces in device memory: where they begin before and after spacing.
struct Table {
    memory: Option<Workspace>,
    n: usize,
    is_spaced: bool,
}

impl Table {
    fn of(cuda: &Cuda, spacing: &Spacing) -> Table {
        let all = spacing.from.iter().chain(spacing.to.iter().flatten());
        let memory = (!spacing.equal).then(|| cuda.table(&all.map(|at| int_of(*at)).collect::<Vec<i32>>()));
        Table { memory, n: spacing.from.len(), is_spaced: spacing.to.is_some() }
    }

    fn before(&self) -> Arg {
        self.memory.as_ref().map_or(Arg::Address(0), Workspace::arg)
    }

    fn after(&self) -> Arg {
        let at = if self.is_spaced { self.n * size_of::<i32>() } else { 0 };
        self.memory.as_ref().map_or(Arg::Address(0), |memory| memory.arg_at(at))
    }
}

impl Product {
    /// Whether the copy engine takes its operands, of bf16, as they lie, all terms as one piece.
    pub(super) fn is_copyable(&self) -> bool {
        [&self.a, &self.b].iter().all(|x| x.dtype == DType::BF16 && x.address % UNIT_BYTES == 0 && x.columns % CHUNK == 0)
    }
}

impl Cuda {
    /// A product of bf16 with terms, on a Hopper GPU; see `multiply_pieces`.
    pub(super) fn multiply_on_hopper(&self, product: Product, terms: Terms, together: Together) {
        let Product { c, a, b, how, m, n, k } = product;
        let spacing = Spacing::of(terms, k, !how.trans_a, how.trans_b);
        let table = Table::of(self, &spacing);
        let [a, b] = [(a, how.trans_a), (b, !how.trans_b)].map(|(x, k_outside)| self.copyable(x, k_outside, &spacing, &table));
        let (processors, n_pieces) = (self.backend.processors(), spacing.n_pieces());
        let form = Form::of(together, (m, n), how.trans_a, n_pieces, processors);
        let n_parts = form.parts(together, (m, n), n_pieces, processors);
        let planes = (n_parts > 1).then(|| self.workspace(n_parts * m * n * size_of::<f32>()));
        let to = planes.as_ref().map_or(Arg::Address(c.address), Workspace::arg);
        let is_bf16 = c.dtype == DType::BF16 && planes.is_none();
        let accumulate = together == Together::InTurn && how.out == Store::Accumulate;
        let map = |x: &Operand, lines: usize| {
            let box_tokens = if x.k_outside { DEPTH } else { lines } as u32;
            Arg::Map(TensorMap { address: x.matrix.address, dim: x.matrix.columns, heads: 1, tokens: x.matrix.rows, box_tokens })
        };
        let mut args = vec![to, int(usize::from(is_bf16)), int(usize::from(accumulate)), map(&a, form.rows())];
        // Each block of a cluster fetches a share of b for all.
        args.push(map(&b, form.columns / form.cluster));
        args.extend([int(m), int(n), table.after(), int(spacing.k()), int(n_pieces), int(n_pieces / n_parts)]);
        let kernel = Kernel::of("matmul_hopper", &format!("matmul_hopper_{}_{}", form.name, layout_name(how)), DType::BF16);
        let blocks = (form.tiles((m, n)) * n_parts).min(form.most_blocks(processors));
        let line = Grid::line(blocks, ((form.consumers + 1) * WARPGROUP) as u32);
        self.backend.launch(&kernel, Grid { shared_bytes: form.shared_bytes() as u32, ..line }, &args);
        if let Some(planes) = planes {
            let args = [Arg::Address(c.address), planes.arg(), int(n_parts), long(m * n)];
            self.backend.launch(&Kernel::of("matmul", "matmul_add", c.dtype), self.flat(m * n), &args);
        }
    }

    /// Whether `multiply_activated_on_hopper` takes it: the form of its kernels is the fastest, and their tiles fit the columns.
    pub(super) fn ends_in_activation_on_hopper(&self, product: &Product, other: u64) -> bool {
        let Product { c, how, m, n, .. } = *product;
        let form = Form::of(Together::InPairs, (m, n), how.trans_a, 1, self.backend.processors());
        let whole = |x: &Matrix| x.address % UNIT_BYTES == 0 && x.columns % CHUNK == 0;
        form == LARGE && n % form.columns == 0 && whole(&c) && product.is_copyable() && other % UNIT_BYTES == 0
    }

    /// A product of bf16, not transposed on its first side, whose kernel ends in what this name says of squared ReLU, to or from `other`
    /// [m, n].
    pub(super) fn multiply_activated_on_hopper(&self, product: &Product, name: &str, other: u64) {
        let (Product { c, a, b, how, m, n, k }, form) = (*product, LARGE);
        let map = |x: Matrix, lines: usize| {
            Arg::Map(TensorMap { address: x.address, dim: x.columns, heads: 1, tokens: x.rows, box_tokens: lines as u32 })
        };
        // Each block of a cluster fetches a share of b for all.
        let lines = if how.trans_b { form.columns / form.cluster } else { DEPTH };
        let args = [Arg::Address(c.address), Arg::Address(other), map(a, form.rows()), map(b, lines), int(m), int(n), int(k)];
        let kernel = Kernel::of("matmul_hopper", &format!("matmul_hopper_whole_{}_{name}", layout_name(how)), DType::BF16);
        let n_blocks = form.tiles((m, n)).min(form.most_blocks(self.backend.processors()));
        let line = Grid::line(n_blocks, ((form.consumers + 1) * WARPGROUP) as u32);
        self.backend.launch(&kernel, Grid { shared_bytes: form.shared_bytes() as u32, ..line }, &args);
    }

    /// The operand as it is, or a copy with its pieces spaced and its rows filled up.
    fn copyable(&self, x: Matrix, k_outside: bool, spacing: &Spacing, table: &Table) -> Operand {
        let fits = x.address % UNIT_BYTES == 0 && x.columns % CHUNK == 0;
        if fits && spacing.to.is_none() {
            return Operand { matrix: x, k_outside, _copy: None };
        }
        let (k, n_lines) = if k_outside { (x.rows, x.columns) } else { (x.columns, x.rows) };
        let to_k = spacing.k();
        let (rows, columns) = if k_outside { (to_k, n_lines.next_multiple_of(CHUNK)) } else { (n_lines, to_k) };
        let copy = self.workspace(rows * columns * DType::BF16.bytes());
        let mut args = vec![copy.arg(), Arg::Address(x.address), int(usize::from(k_outside)), int(n_lines), int(columns)];
        args.extend([table.before(), table.after(), int(spacing.n_pieces()), int(k), int(to_k)]);
        self.backend.launch(&Kernel::of("matmul_hopper", "matmul_hopper_space", DType::BF16), Grid::line(rows, SPACE_THREADS), &args);
        Operand { matrix: Matrix { address: copy.address(), rows, columns, ..x }, k_outside, _copy: Some(copy) }
    }
}

/// A matrix that the copy engine takes.
struct Operand {
    matrix: Matrix,
    k_outside: bool,
    /// Lives until the product was asked for.
    _copy: Option<Workspace>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On 132 processors: the large tile where it fills them, a smaller one where that leaves fewer of them idle.
    #[test]
    fn a_form_is_chosen_by_its_clocks() {
        let of = |together, out, n_pieces| Form::of(together, out, together == Together::InTurn, n_pieces, 132).name;
        for (m, n, n_pieces, expected) in [
            (4096, 18_432, 1, "whole"),
            (4096, 2048, 1, "whole"),
            (1024, 2048, 1, "pairs"),
            (32, 24_576, 1, "small"),
            (1, 2048, 1, "small"),
            (4096, 18_432, 8, "pairs"),
            (1, 2048, 8, "small"),
        ] {
            assert_eq!(of(Together::InPairs, (m, n), n_pieces), expected, "{m} x {n}, {n_pieces} pieces");
        }
        assert_eq!(of(Together::InTurn, (2048, 2048), 1), "turn"); // 128 tiles, one wave
        assert_eq!(of(Together::InTurn, (256, 2048), 1), "small_turn");
    }

    /// Every form fits the shared memory of a block.
    #[test]
    fn forms_fit_shared_memory() {
        for form in [LARGE, LARGE_TURN, WIDE, SMALL, SMALL_TURN] {
            assert!(form.shared_bytes() <= 227 * 1024, "{form:?}: {} bytes", form.shared_bytes());
        }
    }

    /// Pieces are spaced where they, or rows, do not fill what the instructions and the copy engine take, and else left alone.
    #[test]
    fn pieces_are_spaced_where_they_must_be() {
        let of = |terms: Terms, k: usize, side_by_side| {
            let spacing = Spacing::of(terms, k, side_by_side, side_by_side);
            (spacing.from, spacing.to, spacing.equal)
        };
        assert_eq!(of(Terms::Equal(2), 64, true), (vec![0, 32, 64], None, true));
        assert_eq!(of(Terms::Equal(2), 48, true), (vec![0, 24, 48], Some(vec![0, 32, 64]), true));
        assert_eq!(of(Terms::Equal(2), 33, false), (vec![0, 16, 33], None, true));
        assert_eq!(of(Terms::Equal(2), 33, true), (vec![0, 16, 33], Some(vec![0, 32, 64]), true));
        assert_eq!(of(Terms::Equal(1), 45, true), (vec![0, 45], Some(vec![0, 48]), true));
        assert_eq!(of(Terms::Equal(1), 45, false), (vec![0, 45], None, true));
        assert_eq!(of(Terms::From(&[0, 32, 32, 45]), 45, false), (vec![0, 32, 45], None, false));
        assert_eq!(of(Terms::From(&[0, 5, 45]), 45, false), (vec![0, 5, 45], Some(vec![0, 16, 64]), false));
    }
}
