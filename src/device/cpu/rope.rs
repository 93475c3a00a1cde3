//! Rotary embedding: a table of cos and sin for each position, times the attention factor, kept between calls, and the rotation of packed
//! rows.

use super::lanes::{each, kernel, load, store};
use super::parallel::{Shared, for_rows};
use crate::device::{Direction, Heads, Rope};
use std::sync::{Arc, RwLock};

/// cos then sin of each frequency, for positions 0..: [positions, 2, rotary_dims / 2].
pub struct Table {
    of: Rope,
    values: Vec<f32>,
}

impl Table {
    /// [positions, 2, rotary_dims / 2]
    pub fn values(&self) -> &[f32] {
        &self.values
    }
}

/// The tables made so far, one for each way to turn.
#[derive(Default)]
pub struct Tables {
    list: RwLock<Vec<Arc<Table>>>,
}

fn fill(values: &mut [f32], first_position: usize, how: Rope) {
    let (half, frequencies, factor) = (how.rotary_dims / 2, how.frequencies(), how.attention_factor());
    for (row, position) in values.chunks_exact_mut(2 * half).zip(first_position..) {
        for (i, frequency) in frequencies.iter().enumerate() {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            (row[i], row[half + i]) = ((factor * cos) as f32, (factor * sin) as f32);
        }
    }
}

impl Tables {
    /// A table that reaches these positions.
    pub fn get(&self, positions: &[u32], how: Rope) -> Arc<Table> {
        let n_positions = positions.iter().max().map_or(1, |p| *p as usize + 1);
        let wanted = |t: &Arc<Table>| t.of.turns_like(&how);
        let enough = |t: &Arc<Table>| t.values.len() >= n_positions * how.rotary_dims;
        if let Some(table) = self.list.read().expect("no panic under the lock").iter().find(|t| wanted(t) && enough(t)) {
            return Arc::clone(table);
        }
        let n_positions = n_positions.next_power_of_two();
        let mut values = vec![0.0; n_positions * how.rotary_dims];
        let shared = Shared::new(&mut values);
        for_rows(n_positions, 64 * how.rotary_dims, |rows| {
            // SAFETY: the ranges are disjoint.
            fill(unsafe { shared.part(rows.start * how.rotary_dims..rows.end * how.rotary_dims) }, rows.start, how);
        });
        let table = Arc::new(Table { of: how, values });
        let mut list = self.list.write().expect("no panic under the lock");
        list.retain(|t| !(wanted(t) && t.values.len() <= table.values.len()));
        list.push(Arc::clone(&table));
        table
    }
}

kernel! {
    /// Rotates these rows; `table` as `Tables` makes it.
    pub fn rotate over V [E] (qkv: &mut [E], positions: &[u32], table: &[f32], heads: Heads, how: Rope) {
        let (columns, half) = (heads.qkv_columns(), how.rotary_dims / 2);
        let sign = V::splat(if how.direction == Direction::Forward { 1.0 } else { -1.0 });
        for (row, position) in qkv.chunks_exact_mut(columns).zip(positions) {
            let (cos, sin) = table[*position as usize * how.rotary_dims..][..how.rotary_dims].split_at(half);
            for group in row.chunks_exact_mut((heads.queries_per_kv() + 2) * heads.dim) {
                // Queries and the key are rotated, the value behind them is not.
                for head in group.chunks_exact_mut(heads.dim).take(heads.queries_per_kv() + 1) {
                    let (first, second) = head[..2 * half].split_at_mut(half);
                    each!(V, half, |i, n| {
                        let (c, s) = (load::<V, f32>(cos, i, n), load::<V, f32>(sin, i, n).mul(sign));
                        let (a, b) = (load::<V, E>(first, i, n), load::<V, E>(second, i, n));
                        store(first, i, n, a.mul(c).sub(b.mul(s)));
                        store(second, i, n, b.mul(c).add(a.mul(s)));
                    })
                }
            }
        }
    }
}
