//! A plot as SVG: axes, grid, a line (with the spread of what each pixel column holds) and marked points; colours for light
//! and dark readers by `prefers-color-scheme`.

use super::plot::{Axis, Column, Ends, Plot};
use std::fmt::Write;

const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 450.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 55.0;

/// Colour i of 1..: curves; both sets keep a contrast of at least 3 to their background.
const STYLE: &str = "
  svg { color-scheme: light dark; }
  .paper { fill: #ffffff; } .ink { fill: #24292f; } .faint { fill: #57606a; }
  .grid { stroke: #d0d7de; stroke-width: 1; } .axis { stroke: #57606a; stroke-width: 1; fill: none; }
  .c0 { --c: #1f6feb; } .c1 { --c: #bc4c00; } .c2 { --c: #1a7f37; } .c3 { --c: #8250df; }
  .line { stroke: var(--c); stroke-width: 2; fill: none; stroke-linejoin: round; }
  .spread { fill: var(--c); opacity: 0.2; } .mark { fill: var(--c); }
  text { font-family: system-ui, sans-serif; font-size: 13px; } .title { font-size: 16px; font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117; } .ink { fill: #e6edf3; } .faint { fill: #9198a1; }
    .grid { stroke: #30363d; } .axis { stroke: #9198a1; }
    .c0 { --c: #58a6ff; } .c1 { --c: #ffa657; } .c2 { --c: #3fb950; } .c3 { --c: #bc8cff; }
  }
";

impl Plot {
    /// The plot as a complete SVG document.
    pub fn to_svg(&self) -> String {
        let (x_axis, y_axis) = self.axes(8, 6, Ends::AtTicks);
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" role=\"img\">\n\
             <title>{}</title>\n<style>{STYLE}</style>\n<rect class=\"paper\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n",
            escape(&self.title)
        );
        out.push_str(&self.frame(&x_axis, &y_axis));
        for (i, curve) in self.curves.iter().enumerate() {
            let place = |x: f64, y: f64| (x_pixel(&x_axis, x), y_pixel(&y_axis, y));
            if i == 0 {
                line(&mut out, i, &curve.columns(&x_axis, (WIDTH - LEFT - RIGHT) as usize), place);
            } else {
                marked_line(&mut out, i, curve.finite().map(|(x, y)| place(x, y)).collect());
            }
        }
        out.push_str(&self.legend());
        out.push_str("</svg>\n");
        out
    }

    /// Title, grid, ticks and the names of the axes.
    fn frame(&self, x_axis: &Axis, y_axis: &Axis) -> String {
        let mut out = String::new();
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        for &tick in &y_axis.ticks {
            let y = y_pixel(y_axis, tick);
            let (label, text_y) = (y_axis.label(tick), y + 4.0);
            put(&mut out, format_args!("<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>"));
            let x = LEFT - 8.0;
            put(&mut out, format_args!("<text class=\"faint\" x=\"{x}\" y=\"{text_y:.1}\" text-anchor=\"end\">{label}</text>"));
        }
        for &tick in &x_axis.ticks {
            let x = x_pixel(x_axis, tick);
            let (label, text_y) = (x_axis.label(tick), bottom + 20.0);
            put(&mut out, format_args!("<line class=\"grid\" x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{bottom}\"/>"));
            put(&mut out, format_args!("<text class=\"faint\" x=\"{x:.1}\" y=\"{text_y}\" text-anchor=\"middle\">{label}</text>"));
        }
        put(&mut out, format_args!("<path class=\"axis\" d=\"M{LEFT} {TOP}V{bottom}H{right}\"/>"));
        put(&mut out, format_args!("<text class=\"ink title\" x=\"{LEFT}\" y=\"28\">{}</text>", escape(&self.title)));
        let (middle_x, middle_y, name_y) = ((LEFT + right) / 2.0, (TOP + bottom) / 2.0, HEIGHT - 12.0);
        let x_name = escape(&self.x_label);
        put(&mut out, format_args!("<text class=\"ink\" x=\"{middle_x}\" y=\"{name_y}\" text-anchor=\"middle\">{x_name}</text>"));
        let turn = format!("transform=\"translate(18 {middle_y}) rotate(-90)\"");
        put(&mut out, format_args!("<text class=\"ink\" {turn} text-anchor=\"middle\">{}</text>", escape(&self.y_label)));
        out
    }

    fn legend(&self) -> String {
        let mut out = String::new();
        let mut x = WIDTH - RIGHT;
        for (i, curve) in self.curves.iter().enumerate().rev() {
            x -= 8.0 * curve.name.chars().count() as f64;
            put(&mut out, format_args!("<text class=\"ink\" x=\"{x}\" y=\"28\">{}</text>", escape(&curve.name)));
            let colour = i % 4;
            match i {
                0 => put(&mut out, format_args!("<path class=\"c{colour} line\" d=\"M{} 24h20\"/>", x - 26.0)),
                _ => put(&mut out, format_args!("<circle class=\"c{colour} mark\" cx=\"{}\" cy=\"24\" r=\"4\"/>", x - 12.0)),
            }
            x -= 40.0;
        }
        out
    }
}

/// The means as a line over the band of what each column holds.
fn line(out: &mut String, i: usize, columns: &[Column], place: impl Fn(f64, f64) -> (f64, f64)) {
    let path = |points: &mut dyn Iterator<Item = (f64, f64)>| points.map(|(x, y)| format!("{x:.1} {y:.1}")).collect::<Vec<_>>().join("L");
    if columns.is_empty() {
        return;
    }
    let colour = i % 4;
    if columns.iter().any(|c| c.low < c.high) {
        let over = columns.iter().map(|c| place(c.x, c.high));
        let under = columns.iter().rev().map(|c| place(c.x, c.low));
        put(out, format_args!("<path class=\"c{colour} spread\" d=\"M{}Z\"/>", path(&mut over.chain(under))));
    }
    put(out, format_args!("<path class=\"c{colour} line\" d=\"M{}\"/>", path(&mut columns.iter().map(|c| place(c.x, c.y)))));
}

fn marked_line(out: &mut String, i: usize, points: Vec<(f64, f64)>) {
    let colour = i % 4;
    if points.len() > 1 {
        let path = points.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect::<Vec<_>>().join("L");
        put(out, format_args!("<path class=\"c{colour} line\" d=\"M{path}\"/>"));
    }
    for (x, y) in points {
        put(out, format_args!("<circle class=\"c{colour} mark\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"/>"));
    }
}

fn x_pixel(axis: &Axis, x: f64) -> f64 {
    LEFT + axis.share(x) * (WIDTH - LEFT - RIGHT)
}

fn y_pixel(axis: &Axis, y: f64) -> f64 {
    HEIGHT - BOTTOM - axis.share(y) * (HEIGHT - TOP - BOTTOM)
}

fn put(out: &mut String, element: std::fmt::Arguments) {
    writeln!(out, "{element}").expect("writing to a string cannot fail");
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use crate::metrics::{Curve, Plot};

    fn numbers(path: &str) -> Vec<(f64, f64)> {
        let points = path.trim_start_matches('M').trim_end_matches('Z').split('L');
        points.map(|p| p.split_once(' ').map(|(x, y)| (x.parse().expect("x"), y.parse().expect("y"))).expect("x y")).collect()
    }

    /// Points land where a straight map of the axes puts them, titles are escaped, tags are balanced, both schemes are there.
    #[test]
    fn points_land_on_the_axes() {
        let training = Curve { name: "training".into(), points: vec![(0.0, 4.0), (50.0, 3.0), (100.0, 0.0)] };
        let held_out = Curve { name: "held-out".into(), points: vec![(50.0, 2.0), (100.0, 1.0)] };
        let plot = Plot { title: "a < b & c".into(), x_label: "step".into(), y_label: "loss".into(), curves: vec![training, held_out] };
        let svg = plot.to_svg();
        let path = svg.split("class=\"c0 line\" d=\"").nth(1).and_then(|rest| rest.split('"').next()).expect("the line");
        // x: 70 + 710 x / 100; y: 395 - 345 y / 4.
        assert_eq!(numbers(path), [(70.0, 50.0), (425.0, 136.2), (780.0, 395.0)]);
        assert!(
            svg.contains("cx=\"425.0\" cy=\"222.5\"") && svg.contains("a &lt; b &amp; c") && svg.contains("prefers-color-scheme: dark")
        );
        for tag in ["svg", "text", "style", "title"] {
            assert_eq!(svg.matches(&format!("<{tag}")).count(), svg.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        assert!(svg.contains(">100</text>") && svg.contains(">0</text>"), "tick labels");
    }

    /// A long run stays a small file: the line has at most one point for each pixel column.
    #[test]
    fn long_runs_stay_small() {
        let points = (0..800_000).map(|i| (f64::from(i), 2.0 + f64::from(i % 7))).collect();
        let curves = vec![Curve { name: "training".into(), points }];
        let svg = Plot { title: "t".into(), x_label: "step".into(), y_label: "loss".into(), curves }.to_svg();
        assert!(svg.len() < 100_000 && svg.contains("spread"), "{} bytes", svg.len());
    }
}
