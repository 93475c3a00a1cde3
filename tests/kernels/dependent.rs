//! Every kernel waits for the work before it: what kernels/common.cuh asks of kernels that may come onto the device before that has ended,
//! read off the sources. What they do ahead is seen by running it too early: `decode::recorded_kernels_may_come_early`.

use std::path::Path;

/// Functions that wait on behalf of the kernels whose one statement is their call: they do something ahead.
const WAITS: [&str; 4] = ["gemv", "rope_append", "rope_attend", "multiply_all"];

fn without_comments(source: &str) -> String {
    source.lines().map(|line| line.split("//").next().expect("a line").trim_end_matches('\\')).collect::<Vec<_>>().join("\n")
}

/// What stands between `open` (at the beginning of the text, or after it) and its partner.
fn inside(text: &str, open: char, close: char) -> &str {
    let begin = text.find(open).expect("an opening") + 1;
    let mut depth = 1;
    let end = text[begin..].char_indices().find(|(_, c)| {
        depth += i32::from(*c == open) - i32::from(*c == close);
        depth == 0
    });
    &text[begin..begin + end.expect("its partner").0]
}

/// Whether a body lets its successor come at once, waits once, in its outermost block, and neither ends nor writes before that.
fn waits(body: &str) -> bool {
    let body = body.trim();
    let ahead = match body.split("wait_for_predecessors();").collect::<Vec<_>>()[..] {
        [_] => return body.matches("after_predecessors();").count() == 1 && body.starts_with("after_predecessors();"),
        [ahead, _] => ahead,
        _ => return false,
    };
    let is_outermost = ahead.matches('{').count() == ahead.matches('}').count() && !ahead.trim_end().ends_with(')');
    let writes = ["return", "store", "atomic", "] =", "] +=", "put("].iter().any(|word| ahead.contains(word));
    is_outermost && !writes && ahead.contains("let_successor_come();")
}

/// Kernels of a source that do not wait, by their text, and how many there are.
fn kernels_that_do_not(source: &str) -> (Vec<String>, usize) {
    let source = without_comments(source);
    let waiting: Vec<&str> = WAITS
        .into_iter()
        .filter(|function| {
            let definition = source.find(&format!(" void {function}("));
            definition.is_some_and(|at| waits(inside(&source[at..], '{', '}')))
        })
        .collect();
    let bodies: Vec<&str> = source.split("__global__").skip(1).map(|rest| inside(rest, '{', '}')).collect();
    let calls_one = |body: &str| {
        // Its first statement, but for what is checked while compiling.
        let first = body.split(';').map(str::trim).find(|statement| !statement.starts_with("static_assert")).unwrap_or("");
        let called = first.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("");
        waiting.contains(&called) && body.matches("wait").count() == 0
    };
    let wrong = bodies.iter().filter(|body| !waits(body) && !calls_one(body)).map(|body| body.trim().to_string());
    (wrong.collect(), bodies.len())
}

/// A kernel without a wait would read what is not written yet, or write what is still read, on a GPU only, and now and then.
#[test]
fn every_kernel_waits() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let mut n_kernels = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ending| ending == "cu") {
            let (wrong, n) = kernels_that_do_not(&std::fs::read_to_string(&path).unwrap());
            assert!(wrong.is_empty(), "{}: no wait, or one too late: {}", path.display(), wrong.join(" --- "));
            n_kernels += n;
        }
    }
    assert!(n_kernels >= 60, "only {n_kernels} kernels were found");
}

/// The reader sees what it is for.
#[test]
fn a_missing_wait_is_found() {
    let n_wrong = |text: &str| kernels_that_do_not(text).0.len();
    let kernel = |body: &str| format!("extern \"C\" __global__ void __launch_bounds__(256) f(int* x) {{ {body} }}");
    assert_eq!(n_wrong(&kernel("after_predecessors(); x[0] = 1;")), 0);
    assert_eq!(n_wrong(&kernel("let_successor_come(); hint_at(x, 16); wait_for_predecessors(); x[0] = 1;")), 0);
    for wrong in [
        "x[0] = 1;",
        "x[0] = 1; after_predecessors();",
        "let_successor_come(); x[0] = 1; wait_for_predecessors();",
        "let_successor_come(); if (x) return; wait_for_predecessors();",
        "let_successor_come(); if (x) wait_for_predecessors();",
        "let_successor_come(); if (x) { wait_for_predecessors(); }",
        "let_successor_come(); // wait_for_predecessors();\n x[0] = 1;",
        "gemv(x);",
    ] {
        assert_eq!(n_wrong(&kernel(wrong)), 1, "{wrong}");
    }
    let helper = |body: &str| format!("__device__ void gemv(int* x) {{ {body} }}\n{}", kernel("gemv(x);"));
    assert_eq!(n_wrong(&helper("let_successor_come(); wait_for_predecessors(); x[0] = 1;")), 0);
    assert_eq!(n_wrong(&helper("let_successor_come(); x[0] = 1;")), 1);
}
