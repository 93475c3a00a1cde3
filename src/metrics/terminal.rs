//! A plot as text: braille dots (2 x 4 a character) for the first curve, letters for the points of the others. No colour.

use super::plot::{Axis, Ends, Plot};

const MARKS: [char; 4] = ['o', 'x', '+', '*'];
const LABEL_COLUMNS: usize = 8;

impl Plot {
    /// Draws the plot `width` characters wide and `height` lines high in all (at least 40 x 8). Where several points fall into
    /// one column of dots, their mean is drawn.
    pub fn to_text(&self, width: usize, height: usize) -> String {
        let (width, height) = (width.max(40), height.max(8));
        let (columns, lines) = (width - LABEL_COLUMNS - 2, height - 4);
        let (x_axis, y_axis) = self.axes(columns / 12, lines / 3, Ends::AtValues);
        let mut canvas = Canvas::new(columns, lines);
        for (i, curve) in self.curves.iter().enumerate() {
            let place = |(x, y): (f64, f64)| canvas_point(&canvas, &x_axis, &y_axis, x, y);
            if i == 0 {
                let points: Vec<(i64, i64)> = curve.columns(&x_axis, 2 * columns).iter().map(|c| place((c.x, c.y))).collect();
                canvas.dots_along(&points);
            } else {
                let points: Vec<(i64, i64)> = curve.finite().map(place).collect();
                points.iter().for_each(|&point| canvas.mark(point, MARKS[(i - 1) % MARKS.len()]));
            }
        }
        let mut out = format!("{}\n", self.heading());
        for line in 0..lines {
            let label = y_axis.ticks.iter().rev().find(|&&tick| tick_line(&y_axis, tick, lines) == line);
            let text = label.map_or(String::new(), |&tick| y_axis.label(tick));
            let edge = if label.is_some() { '\u{2524}' } else { '\u{2502}' };
            out.push_str(format!("{text:>LABEL_COLUMNS$} {edge}{}", canvas.line(line)).trim_end());
            out.push('\n');
        }
        out.push_str(&self.x_lines(&x_axis, columns));
        out
    }

    /// Title and legend.
    fn heading(&self) -> String {
        let legend = self.curves.iter().enumerate().map(|(i, curve)| match i {
            0 => format!("\u{2812}\u{2812} {}", curve.name),
            _ => format!("{} {}", MARKS[(i - 1) % MARKS.len()], curve.name),
        });
        format!("{}   {}   ({})", self.title, legend.collect::<Vec<_>>().join("   "), self.y_label)
    }

    /// The axis under the plot: its line with ticks, its numbers, its name.
    fn x_lines(&self, axis: &Axis, columns: usize) -> String {
        let mut line: Vec<char> = vec!['\u{2500}'; columns];
        let mut numbers: Vec<char> = vec![' '; columns + LABEL_COLUMNS];
        let mut free = 0;
        for &tick in &axis.ticks {
            let column = ((axis.share(tick) * columns as f64) as usize).min(columns - 1);
            line[column] = '\u{252c}';
            let text: Vec<char> = axis.label(tick).chars().collect();
            let start = (column + LABEL_COLUMNS / 2).saturating_sub(text.len() / 2).min(numbers.len() - text.len());
            if start >= free {
                numbers[start..start + text.len()].copy_from_slice(&text);
                free = start + text.len() + 1;
            }
        }
        let indent = " ".repeat(LABEL_COLUMNS + 1);
        let numbers: String = numbers.into_iter().collect();
        let numbers = format!("{}{}", " ".repeat(LABEL_COLUMNS + 2 - LABEL_COLUMNS / 2), numbers);
        let name = format!("{:>width$}", self.x_label, width = LABEL_COLUMNS + 2 + columns);
        format!("{indent}\u{2514}{}\n{}\n{name}\n", line.into_iter().collect::<String>(), numbers.trim_end())
    }
}

/// The line of text on which a tick's label stands.
fn tick_line(axis: &Axis, tick: f64, lines: usize) -> usize {
    (((1.0 - axis.share(tick)) * lines as f64) as usize).min(lines - 1)
}

fn canvas_point(canvas: &Canvas, x_axis: &Axis, y_axis: &Axis, x: f64, y: f64) -> (i64, i64) {
    let (dots_x, dots_y) = (2 * canvas.columns, 4 * canvas.lines);
    let column = (x_axis.share(x) * dots_x as f64) as usize;
    let line = ((1.0 - y_axis.share(y)) * dots_y as f64) as usize;
    (column.min(dots_x - 1) as i64, line.min(dots_y - 1) as i64)
}

/// A grid of braille cells with letters over them.
struct Canvas {
    columns: usize,
    lines: usize,
    dots: Vec<u8>,
    marks: Vec<Option<char>>,
}

impl Canvas {
    fn new(columns: usize, lines: usize) -> Canvas {
        Canvas { columns, lines, dots: vec![0; columns * lines], marks: vec![None; columns * lines] }
    }

    fn set(&mut self, (x, y): (i64, i64)) {
        // Bits of a braille cell by (column, row) of the dot.
        const BITS: [[u8; 4]; 2] = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]];
        let cell = (y / 4) as usize * self.columns + (x / 2) as usize;
        self.dots[cell] |= BITS[(x % 2) as usize][(y % 4) as usize];
    }

    fn mark(&mut self, (x, y): (i64, i64), mark: char) {
        self.marks[(y / 4) as usize * self.columns + (x / 2) as usize] = Some(mark);
    }

    /// Straight lines from point to point.
    fn dots_along(&mut self, points: &[(i64, i64)]) {
        points.first().into_iter().for_each(|&point| self.set(point));
        for pair in points.windows(2) {
            let ((x0, y0), (x1, y1)) = (pair[0], pair[1]);
            let n = (x1 - x0).abs().max((y1 - y0).abs()).max(1);
            for i in 0..=n {
                let along = |from: i64, to: i64| (from * n + (to - from) * i + n / 2).div_euclid(n);
                self.set((along(x0, x1), along(y0, y1)));
            }
        }
    }

    fn line(&self, line: usize) -> String {
        let cells = line * self.columns..(line + 1) * self.columns;
        let text = cells.map(|cell| match (self.marks[cell], self.dots[cell]) {
            (Some(mark), _) => mark,
            (None, 0) => ' ',
            (None, dots) => char::from_u32(0x2800 + u32::from(dots)).expect("a braille pattern"),
        });
        text.collect()
    }
}

#[cfg(test)]
mod tests {
    use crate::metrics::{Curve, Plot};

    fn falling() -> Plot {
        let training = (1..=240).map(|i| (f64::from(i), 9.0 * f64::from(i).powf(-0.2))).collect();
        let held_out = (1..=4).map(|i| (60.0 * f64::from(i), 9.0 * (60.0 * f64::from(i)).powf(-0.2) + 0.1)).collect();
        let curves = vec![Curve { name: "training".into(), points: training }, Curve { name: "held-out".into(), points: held_out }];
        Plot { title: "runs/first".into(), x_label: "step".into(), y_label: "loss, nats a token".into(), curves }
    }

    /// The drawing has its exact size, title, legend and numbers, and a falling curve's dots fall from left to right.
    #[test]
    fn a_falling_curve_is_drawn_falling() {
        let text = falling().to_text(80, 20);
        println!("{text}");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 20);
        assert!(lines.iter().all(|line| line.chars().count() <= 80), "{text}");
        assert!(lines[0].contains("runs/first") && lines[0].contains("training") && lines[0].contains("o held-out"), "{text}");
        assert!(lines[18].contains("100") && lines[18].contains("200") && lines[19].ends_with("step"), "{text}");
        let is_dot = |c: char| ('\u{2801}'..='\u{28ff}').contains(&c);
        let first_dot = |column: usize| (1..17).find(|&line| lines[line].chars().nth(column).is_some_and(|c| is_dot(c) || c == 'o'));
        let tops: Vec<usize> =
            (10..80).map(|column| first_dot(column).unwrap_or_else(|| panic!("nothing in column {column}\n{text}"))).collect();
        // A mark may cover the curve's cell, one line above it at most.
        assert!(tops.windows(2).all(|pair| pair[1] + 1 >= pair[0]), "{text}");
        assert!(tops[0] <= 2 && tops[69] >= 10, "{text}");
        assert_eq!(text.matches('o').count() - lines[0].matches('o').count(), 4, "{text}");
    }

    /// No rows, one row, a flat curve and a diverged one are drawn, not panics, at any size.
    #[test]
    fn odd_curves_are_drawn() {
        for points in [
            vec![],
            vec![(1.0, 2.0)],
            vec![(1.0, 2.0), (2.0, 2.0)],
            vec![(1.0, f64::NAN), (2.0, f64::INFINITY)],
            vec![(1e9, -1e-9), (2e9, 1e9)],
        ] {
            for (width, height) in [(0, 0), (40, 8), (80, 20), (200, 50)] {
                let mut plot = falling();
                plot.curves[0].points = points.clone();
                assert!(!plot.to_text(width, height).is_empty());
                plot.curves.truncate(1);
                let lines = plot.to_text(width, height);
                assert_eq!(lines.lines().count(), height.max(8), "{lines}");
            }
        }
    }
}
