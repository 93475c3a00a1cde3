//! What counts as the answer in a generated text, and whether it is the target: the filters and the `exact_match` of
//! lm-evaluation-harness, with its regular expressions as they stand in its tasks.

use fancy_regex::Regex;
use std::sync::LazyLock;

/// A filter that finds the answer in a text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extraction {
    /// The number after `####` (GSM8K's `strict-match`).
    StrictMatch,
    /// The last number (GSM8K's `flexible-extract`).
    FlexibleExtract,
    /// What follows `the answer is`, without the last character of the line (BBH's `get-answer`).
    GetAnswer,
}

/// What stands for an answer that was not found.
const INVALID: &str = "[invalid]";

static STRICT: LazyLock<Regex> = LazyLock::new(|| pattern(r"#### (\-?[0-9\.\,]+)"));
static FLEXIBLE: LazyLock<Regex> = LazyLock::new(|| pattern(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"));
static ANSWER: LazyLock<Regex> = LazyLock::new(|| pattern(r"(?<=the answer is )(.*)(?=.)"));
/// What GSM8K's comparison leaves out, in turn; Python's `$` also stands before a newline at the end.
static IGNORED: LazyLock<[Regex; 4]> = LazyLock::new(|| [r",", r"\$", r"(?s).*#### ", r"\.(?=\n?\z)"].map(pattern));

fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a constant pattern")
}

impl Extraction {
    /// Its name in the harness.
    pub fn name(self) -> &'static str {
        match self {
            Extraction::StrictMatch => "strict-match",
            Extraction::FlexibleExtract => "flexible-extract",
            Extraction::GetAnswer => "get-answer",
        }
    }

    /// The answer in a text, or `[invalid]`.
    pub fn extract(self, text: &str) -> String {
        let found = match self {
            Extraction::StrictMatch => group(STRICT.captures_iter(text).next()),
            Extraction::FlexibleExtract => group(FLEXIBLE.captures_iter(text).last()),
            Extraction::GetAnswer => group(ANSWER.captures_iter(text).next()),
        };
        found.map_or(INVALID.into(), |found| super::python::strip(found).to_string())
    }

    /// Whether an extracted answer is the target.
    pub fn is_match(self, extracted: &str, target: &str) -> bool {
        match self {
            Extraction::GetAnswer => extracted == target,
            Extraction::StrictMatch | Extraction::FlexibleExtract => bare(extracted) == bare(target),
        }
    }
}

/// The first group that took part in a match.
fn group<'a>(captures: Option<fancy_regex::Result<fancy_regex::Captures<'a>>>) -> Option<&'a str> {
    let captures = captures?.expect("constant patterns match within the limits of the engine");
    captures.iter().skip(1).flatten().next().map(|found| found.as_str())
}

fn bare(text: &str) -> String {
    let without = |text: String, pattern: &Regex| pattern.replace_all(&text, "").into_owned();
    IGNORED.iter().fold(text.to_string(), without).to_lowercase()
}

/// What a generated text is cut to: each stop string in turn ends what is left.
pub fn cut_at_stops<'a>(text: &'a str, until: &[&str]) -> &'a str {
    until.iter().fold(text, |text, stop| text.split(stop).next().expect("split gives one"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Python's `re` finds, and what the harness makes of it, for texts in which the filters differ.
    #[test]
    fn filters_find_what_python_finds() {
        use Extraction::*;
        let cases = [
            (StrictMatch, "so 12\n#### 1,234.", "1,234."),
            (StrictMatch, "#### -5\n#### 6", "-5"),
            (StrictMatch, "####7", INVALID),
            (FlexibleExtract, "12 apples cost $3.50.", "$3.50."),
            (FlexibleExtract, "I have 7", "7"),
            (FlexibleExtract, "a. b, c", INVALID),
            (FlexibleExtract, "wait ...", "..."),
            (FlexibleExtract, "", INVALID),
            (GetAnswer, "So the answer is (B).", "(B)"),
            (GetAnswer, "the answer is yes", "ye"),
            (GetAnswer, "the answer is \nthe answer is no.", "no"),
            (GetAnswer, "the answer is x", ""),
            (GetAnswer, "The answer is no.", INVALID),
        ];
        for (filter, text, expected) in cases {
            assert_eq!(filter.extract(text), expected, "{filter:?} {text:?}");
        }
        for (extracted, target, is_match) in [
            ("1,234.", "so\n#### 1234", true),
            ("$5", "a #### 4 #### 5", true),
            ("5.0", "#### 5", false),
            (INVALID, "#### 5", false),
            ("7", "#### 7.\n", false),
        ] {
            assert_eq!(StrictMatch.is_match(extracted, target), is_match, "{extracted:?} {target:?}");
        }
        assert!(!GetAnswer.is_match("yes", "Yes") && GetAnswer.is_match("(A)", "(A)"));
    }

    /// The harness splits by one stop string after the other; one that began before the cut and ended after it is not seen.
    #[test]
    fn stops_cut_in_turn() {
        assert_eq!(cut_at_stops("a\n\nQ: b", &["</s>", "Q", "\n\n"]), "a");
        assert_eq!(cut_at_stops("abc", &["bc", "abc"]), "a");
        assert_eq!(cut_at_stops("none", &["</s>"]), "none");
    }
}
