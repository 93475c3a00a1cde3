//! The table of a proof: a row for each quantity, what was found against what was expected, and the verdict over all.

use crate::error::{Error, Kind, Result};
use crate::tensor::DType;
use std::fmt;

/// How the rows of a table are judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Judge {
    /// Every bit.
    Bits,
    /// |found - expected| against what is allowed.
    Norms,
}

/// The differences of one quantity, collected portion by portion.
#[derive(Clone, PartialEq, Debug)]
pub struct Differences {
    dtype: DType,
    n_elements: usize,
    n_unequal: usize,
    max_ulp: u64,
    max_difference: f64,
    max_expected: f64,
    squares_of_difference: f64,
    squares_of_expected: f64,
}

impl Differences {
    /// None yet. `dtype` is what the values are stored as: an ulp is one of its steps.
    pub fn new(dtype: DType) -> Differences {
        Differences {
            dtype,
            n_elements: 0,
            n_unequal: 0,
            max_ulp: 0,
            max_difference: 0.0,
            max_expected: 0.0,
            squares_of_difference: 0.0,
            squares_of_expected: 0.0,
        }
    }

    /// Adds these elements, widened to f32. Panics when they are not equally many.
    pub fn add(&mut self, found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len(), "differences of tensors of other sizes");
        for (&a, &b) in found.iter().zip(expected) {
            let (equal, ulps) = self.compare(a, b);
            self.expect(f64::from(b));
            self.differ(equal, ulps, (f64::from(a), f64::from(b)));
        }
    }

    /// Adds a number that is kept in f64; its ulps are those of f64.
    pub fn add_f64(&mut self, found: f64, expected: f64) {
        let key = |x: f64| if x.is_sign_negative() { -((x.to_bits() & !(1 << 63)) as i64) } else { x.to_bits() as i64 };
        self.expect(expected);
        self.differ(found.to_bits() == expected.to_bits(), key(found).abs_diff(key(expected)), (found, expected));
    }

    /// Adds what other ranks hold of elements that are counted already: (index in `expected`, value).
    pub fn add_conflicts(&mut self, conflicts: &[(usize, f32)], expected: &[f32]) {
        for &(at, found) in conflicts {
            let (equal, ulps) = self.compare(found, expected[at]);
            self.differ(equal, ulps, (f64::from(found), f64::from(expected[at])));
        }
    }

    /// Whether bits are equal, and the steps between two values.
    fn compare(&self, a: f32, b: f32) -> (bool, u64) {
        let shift = if self.dtype == DType::BF16 { 16 } else { 0 };
        let ulps = order(a.to_bits() >> shift, 31 - shift).abs_diff(order(b.to_bits() >> shift, 31 - shift));
        (a.to_bits() == b.to_bits(), ulps)
    }

    fn expect(&mut self, expected: f64) {
        self.n_elements += 1;
        self.max_expected = self.max_expected.max(expected.abs());
        self.squares_of_expected += expected * expected;
    }

    fn differ(&mut self, equal: bool, ulps: u64, (found, expected): (f64, f64)) {
        if equal {
            return;
        }
        self.n_unequal += 1;
        self.max_ulp = self.max_ulp.max(ulps);
        let difference = (found - expected).abs();
        // max() would pass over NaN.
        let difference = if difference.is_nan() { f64::INFINITY } else { difference };
        self.max_difference = self.max_difference.max(difference);
        self.squares_of_difference += difference * difference;
    }

    /// Elements seen.
    pub fn n_elements(&self) -> usize {
        self.n_elements
    }

    /// |expected|
    pub fn norm(&self) -> f64 {
        self.squares_of_expected.sqrt()
    }

    /// The row of these differences. `allowed`: of |found - expected| / |expected|.
    pub fn row(self, name: impl Into<String>, allowed: f64) -> Row {
        let over = |x: f64, y: f64| if x == 0.0 { 0.0 } else { x / y };
        Row {
            name: name.into(),
            n_elements: self.n_elements,
            n_unequal: self.n_unequal,
            max_ulp: self.max_ulp,
            max_relative: over(self.max_difference, self.max_expected),
            norm_relative: over(self.squares_of_difference.sqrt(), self.norm()),
            allowed,
        }
    }
}

/// Sign and magnitude as an integer whose steps are ulps; -0 and 0 are the same.
fn order(bits: u32, sign_bit: u32) -> i64 {
    let magnitude = i64::from(bits & !(1 << sign_bit));
    if bits >> sign_bit & 1 == 1 { -magnitude } else { magnitude }
}

/// One quantity.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    /// What it is.
    pub name: String,
    /// Its size.
    pub n_elements: usize,
    /// Elements whose bits differ; one that several ranks hold counts for each that differs from the others.
    pub n_unequal: usize,
    /// The largest difference in steps of its type.
    pub max_ulp: u64,
    /// The largest |found - expected| over the largest |expected|.
    pub max_relative: f64,
    /// |found - expected| over |expected|, as vectors.
    pub norm_relative: f64,
    /// What `norm_relative` may be where bits may differ.
    pub allowed: f64,
}

impl Row {
    /// Whether it stands before this judge. NaN does not.
    pub fn holds(&self, judge: Judge) -> bool {
        match judge {
            Judge::Bits => self.n_unequal == 0,
            Judge::Norms => self.norm_relative <= self.allowed,
        }
    }
}

/// All rows.
#[derive(Clone, PartialEq, Debug)]
pub struct Table {
    /// How they are judged.
    pub judge: Judge,
    /// In the order in which they are shown.
    pub rows: Vec<Row>,
}

impl Table {
    /// Err (exit code 4) when a row does not hold: how many, and the worst of them.
    pub fn verdict(&self) -> Result<()> {
        let failed: Vec<&Row> = self.rows.iter().filter(|row| !row.holds(self.judge)).collect();
        let excess = |row: &Row| match self.judge {
            Judge::Bits => row.max_ulp as f64,
            Judge::Norms => row.norm_relative / row.allowed,
        };
        let Some(worst) = failed.iter().max_by(|a, b| excess(a).total_cmp(&excess(b))) else { return Ok(()) };
        let (what, remedy) = match self.judge {
            Judge::Bits => (
                format!("{} values differ, by up to {} ulp, expected equal bits", worst.n_unequal, worst.max_ulp),
                "do not train in this layout before it is explained: report it with this table and the recipe",
            ),
            Judge::Norms => (
                format!("it differs by {:.2e} of its norm, expected at most {:.2e}", worst.norm_relative, worst.allowed),
                "that is more than rounding makes: do not train in this layout; see that a reference has the same weights and tokens",
            ),
        };
        let wrong = format!("{} of {} rows of the table do not hold; the worst is {}: {what}", failed.len(), self.rows.len(), worst.name);
        Err(Error::new(Kind::Numeric, wrong).remedy(remedy))
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let width = self.rows.iter().map(|row| row.name.len()).max().unwrap_or(0).max(9);
        writeln!(f, "{:<width$}  {:>12}  {:>9}  {:>9}  {:>9}  result", "parameter", "max ulp", "max rel", "norm rel", "allowed")?;
        for row in &self.rows {
            let allowed = if self.judge == Judge::Bits { "0".into() } else { format!("{:.2e}", row.allowed) };
            let result = match (row.n_unequal, row.holds(self.judge)) {
                (0, _) => "equal".to_string(),
                (_, true) => "within".to_string(),
                (n, false) => format!("NOT EQUAL ({n} differ)"),
            };
            let (ulp, max, norm) = (row.max_ulp, row.max_relative, row.norm_relative);
            writeln!(f, "{:<width$}  {ulp:>12}  {max:>9.2e}  {norm:>9.2e}  {allowed:>9}  {result}", row.name)?;
        }
        let n_equal = self.rows.iter().filter(|row| row.n_unequal == 0).count();
        let n_held = self.rows.iter().filter(|row| row.holds(self.judge)).count();
        write!(
            f,
            "{} rows: {n_equal} equal in every bit, {} within tolerance, {} not",
            self.rows.len(),
            n_held - n_equal,
            self.rows.len() - n_held
        )
    }
}
