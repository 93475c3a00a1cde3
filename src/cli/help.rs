//! `--help` in the width of the terminal. The texts stand in the sources as paragraphs, tables and commands of up to 140 columns; clap
//! alone would cut each of their lines by itself. Here paragraphs are filled, the last column of a table goes on below itself, and a
//! command that is broken can still be copied into a shell.

use clap::{Arg, Command, Parser};

/// Columns where the output is no terminal, and the most that are used: longer lines read badly.
const WIDTH: usize = 100;
/// Columns before the help of an argument.
const ARGUMENT_INDENT: usize = 10;
/// A table's columns stand at least so far apart.
const GAP: &str = "  ";

/// The arguments of this program. Ends it, as clap does, when they are wrong or help was asked for.
pub fn parse<T: Parser>() -> T {
    let columns = console::Term::stdout().size_checked().map_or(WIDTH, |(_, columns)| usize::from(columns));
    let mut command = fitted(T::command(), columns.clamp(40, WIDTH));
    let mut matches = command.get_matches_mut();
    T::from_arg_matches_mut(&mut matches).unwrap_or_else(|error| error.format(&mut command).exit())
}

/// All texts of a command and those below it in so many columns.
fn fitted(command: Command, width: usize) -> Command {
    let about = command.get_long_about().map(|text| fit(&text.to_string(), width));
    let command = match about {
        Some(about) => command.long_about(about),
        None => command,
    };
    let of_argument = |argument: Arg| match argument.get_long_help().map(|text| fit(&text.to_string(), width - ARGUMENT_INDENT)) {
        Some(help) => argument.long_help(help),
        None => argument,
    };
    command.term_width(width).mut_args(of_argument).mut_subcommands(|below| fitted(below, width))
}

/// What stands together: a paragraph, a line of a table with what continues it, or an example.
struct Item {
    /// Where its first line begins.
    indent: usize,
    /// Where lines after the first begin; of an example, unless it fits in one line.
    hang: usize,
    text: String,
    kind: ItemKind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ItemKind {
    Paragraph,
    /// Of a table: the spaces between its columns stay.
    Row,
    /// A command for a shell.
    Shell,
    /// Something else to be read as it is.
    Example,
}

/// A text in so many columns. Lines that do not begin with a space are paragraphs up to an empty line or an indented one. Indented lines
/// with two spaces or more between words are rows of a table, and lines that begin below the last column of one continue it.
fn fit(text: &str, width: usize) -> String {
    let mut lines = Vec::new();
    let mut item: Option<Item> = None;
    for line in text.lines() {
        let words = line.trim();
        let indent = line.len() - line.trim_start().len();
        match &mut item {
            _ if words.is_empty() => {
                lines.extend(item.take().into_iter().flat_map(|item| item.lines(width)));
                lines.push(String::new());
            }
            Some(item) if item.continues_at(indent) => {
                item.text.push(' ');
                item.text.push_str(words);
            }
            _ => lines.extend(item.replace(Item::of(indent, words)).into_iter().flat_map(|item| item.lines(width))),
        }
    }
    lines.extend(item.into_iter().flat_map(|item| item.lines(width)));
    lines.join("\n")
}

impl Item {
    fn of(indent: usize, words: &str) -> Item {
        let column = words.rfind(GAP).map(|gap| gap + GAP.len());
        let is_shell = ["trireme-", "mpirun ", "srun ", "sbatch "].iter().any(|program| words.starts_with(program));
        let (hang, kind) = match column {
            _ if indent == 0 => (0, ItemKind::Paragraph),
            Some(column) => (indent + column, ItemKind::Row),
            None if is_shell => (indent + 2, ItemKind::Shell),
            None => (indent + 2, ItemKind::Example),
        };
        Item { indent, hang, text: words.to_string(), kind }
    }

    fn continues_at(&self, indent: usize) -> bool {
        matches!(self.kind, ItemKind::Paragraph | ItemKind::Row) && indent == self.hang
    }

    fn lines(self, width: usize) -> Vec<String> {
        let Item { indent, hang, text, kind } = self;
        // Room for what ends a line that goes on.
        let (end, room) = if kind == ItemKind::Shell { (" \\", width - 2) } else { ("", width) };
        // The columns of a table before the last are one word.
        let head = if kind == ItemKind::Row { hang - indent } else { 0 };
        let (mut lines, mut line) = (Vec::new(), " ".repeat(indent) + &text[..head]);
        let mut is_empty = true;
        let words: Vec<&str> = text[head..].split(' ').filter(|word| !word.is_empty()).collect();
        let one_line = indent + text.chars().count() <= width;
        for (idx, word) in words.iter().enumerate() {
            // The value of an option stays beside it.
            let with_next = match words.get(idx + 1) {
                Some(next) if kind == ItemKind::Shell && word.starts_with("--") && !next.starts_with('-') => next.chars().count() + 1,
                _ => 0,
            };
            if !is_empty && !one_line && line.chars().count() + 1 + word.chars().count() + with_next > room {
                lines.push(std::mem::replace(&mut line, " ".repeat(hang)) + end);
                is_empty = true;
            }
            if !is_empty {
                line.push(' ');
            }
            line.push_str(word);
            is_empty = false;
        }
        lines.push(line);
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of a source that were broken elsewhere are one paragraph; what is indented below it is not part of it. clap's own way breaks
    /// each line again, so that short and long lines alternate.
    #[test]
    fn paragraphs_are_filled() {
        let text = "One two three\nfour five. Six\n  a: 1\n\nSeven";
        assert_eq!(fit(text, 20), "One two three four\nfive. Six\n  a: 1\n\nSeven");
    }

    /// The last column of a table stays a column; the ones before are not touched.
    #[test]
    fn rows_go_on_below_their_last_column() {
        let text = "  top_k  0   draw from many\n             tokens\n  seed   0   of noise";
        assert_eq!(fit(text, 40), "  top_k  0   draw from many tokens\n  seed   0   of noise");
        assert_eq!(fit(text, 24), "  top_k  0   draw from\n             many tokens\n  seed   0   of noise");
    }

    /// A command that is broken can be copied: each line but the last ends with a backslash, an option stays with its value.
    #[test]
    fn commands_can_be_copied() {
        let text = "  trireme-x --recipe a.toml --out runs/first";
        assert_eq!(fit(text, 50), text);
        assert_eq!(fit(text, 40), "  trireme-x --recipe a.toml \\\n    --out runs/first");
        let joined = fit(text, 30).replace("\\\n", " ");
        assert_eq!(joined.split_whitespace().collect::<Vec<_>>(), text.split_whitespace().collect::<Vec<_>>());
        assert!(fit(text, 30).lines().all(|line| line.len() <= 30));
    }
}
