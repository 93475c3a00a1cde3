//! A plot as data, and what both drawings of it share: ranges, round tick values, and columns of points.

/// A named line.
#[derive(Clone, PartialEq, Debug)]
pub struct Curve {
    /// As the legend calls it.
    pub name: String,
    /// (x, y), by ascending x. Points that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// Curves over common axes. The first curve is drawn as a line, the others as marked points.
#[derive(Clone, PartialEq, Debug)]
pub struct Plot {
    /// Over the plot.
    pub title: String,
    /// Under it.
    pub x_label: String,
    /// Beside it.
    pub y_label: String,
    /// What to draw.
    pub curves: Vec<Curve>,
}

/// An axis: its range and its ticks.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Axis {
    pub low: f64,
    pub high: f64,
    pub ticks: Vec<f64>,
    /// Decimals that tell the ticks apart, in plain and in scientific notation.
    decimals: usize,
    digits: usize,
}

impl Axis {
    /// An axis over these values with about `n` round ticks; the range ends at ticks when `to_ticks`.
    pub fn over(values: impl Iterator<Item = f64>, n: usize, ends: Ends) -> Axis {
        let (mut low, mut high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        if high - low <= high.abs().max(low.abs()) * 1e-9 {
            let margin = if high == 0.0 { 1.0 } else { high.abs() * 0.1 };
            (low, high) = (low - margin, high + margin);
        }
        let raw = (high - low) / n.max(1) as f64;
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|&step| step >= raw * 0.999).unwrap_or(10.0 * power);
        if ends == Ends::AtTicks {
            (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
        }
        let first = (low / step - 1e-9).ceil() as i64;
        let last = (high / step + 1e-9).floor() as i64;
        let ticks = (first..=last).map(|i| i as f64 * step).collect();
        let power = |x: f64| (x * 1.0001).log10().floor();
        let largest = low.abs().max(high.abs());
        Axis { low, high, ticks, decimals: (-power(step)).max(0.0) as usize, digits: (power(largest) - power(step)).max(0.0) as usize }
    }

    /// 0 at `low`, 1 at `high`.
    pub fn share(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    /// The text of a tick.
    pub fn label(&self, tick: f64) -> String {
        if self.decimals > 6 || tick.abs() >= 1e7 {
            return format!("{tick:.*e}", self.digits);
        }
        let text = format!("{tick:.*}", self.decimals);
        if text.trim_start_matches(['-', '0', '.']).is_empty() { text.trim_start_matches('-').into() } else { text }
    }
}

/// Where a range ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ends {
    /// At the outermost values.
    AtValues,
    /// At the ticks around them.
    AtTicks,
}

impl Plot {
    /// Both axes, with about this many ticks; x ends at the outermost points.
    pub(super) fn axes(&self, n_x: usize, n_y: usize, y_ends: Ends) -> (Axis, Axis) {
        let points = || self.curves.iter().flat_map(Curve::finite);
        (Axis::over(points().map(|p| p.0), n_x, Ends::AtValues), Axis::over(points().map(|p| p.1), n_y, y_ends))
    }
}

/// What falls into one column of a drawing.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Column {
    /// Mean x.
    pub x: f64,
    /// Mean, least and largest y.
    pub y: f64,
    pub low: f64,
    pub high: f64,
}

impl Curve {
    pub(super) fn finite(&self) -> impl Iterator<Item = (f64, f64)> + '_ {
        self.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite())
    }

    /// The points gathered into `n` columns of the axis, empty ones left out.
    pub(super) fn columns(&self, axis: &Axis, n: usize) -> Vec<Column> {
        let mut columns: Vec<(usize, f64, Column)> = Vec::new();
        for (x, y) in self.finite() {
            let index = ((axis.share(x) * n as f64) as usize).min(n - 1);
            match columns.last_mut().filter(|(last, ..)| *last == index) {
                Some((_, count, column)) => {
                    *count += 1.0;
                    column.x += (x - column.x) / *count;
                    column.y += (y - column.y) / *count;
                    (column.low, column.high) = (column.low.min(y), column.high.max(y));
                }
                None => columns.push((index, 1.0, Column { x, y, low: y, high: y })),
            }
        }
        columns.into_iter().map(|(_, _, column)| column).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ticks are round, inside the range, strictly ascending and told apart by their labels, for ranges of any size and place.
    #[test]
    fn ticks_are_round_and_distinct() {
        let random = crate::rng::Random::new(3, "axes");
        for i in 0..2000 {
            let low = random.normal(3 * i) * 10f64.powf(random.uniform(3 * i + 1) * 12.0 - 6.0);
            let high = low + low.abs().max(1e-3) * 10f64.powf(random.uniform(3 * i + 2) * 6.0 - 4.0);
            for ends in [Ends::AtValues, Ends::AtTicks] {
                let axis = Axis::over([low, high].into_iter(), 5, ends);
                assert!(axis.low <= low && axis.high >= high, "{axis:?} {low} {high}");
                assert!((2..=8).contains(&axis.ticks.len()), "{axis:?}");
                for pair in axis.ticks.windows(2) {
                    assert!(pair[0] < pair[1]);
                    assert_ne!(axis.label(pair[0]), axis.label(pair[1]), "{axis:?}");
                }
                assert!(axis.ticks.iter().all(|&tick| (-1e-6..=1.0 + 1e-6).contains(&axis.share(tick))), "{axis:?}");
            }
        }
    }

    /// No points, one point, equal points and points that are not finite all have an axis.
    #[test]
    fn degenerate_ranges_have_axes() {
        for values in [vec![], vec![3.0], vec![0.0, 0.0], vec![-2.0, -2.0, -2.0]] {
            let axis = Axis::over(values.iter().copied(), 4, Ends::AtTicks);
            assert!(axis.low < axis.high && axis.ticks.len() >= 2, "{values:?} {axis:?}");
        }
        let curve = Curve { name: String::new(), points: vec![(1.0, f64::NAN), (2.0, 5.0), (f64::INFINITY, 1.0)] };
        assert_eq!(curve.finite().collect::<Vec<_>>(), [(2.0, 5.0)]);
    }

    /// Columns keep the mean, the least and the largest of what falls into them.
    #[test]
    fn columns_summarise() {
        let points = (0..100).map(|i| (f64::from(i), f64::from(i % 10))).collect();
        let curve = Curve { name: String::new(), points };
        let axis = Axis::over([0.0, 100.0].into_iter(), 5, Ends::AtValues);
        let columns = curve.columns(&axis, 10);
        assert_eq!(columns.len(), 10);
        assert!(columns.iter().all(|c| c.low == 0.0 && c.high == 9.0 && (c.y - 4.5).abs() < 1e-12), "{columns:?}");
    }
}
