//! A table, for a terminal or as Markdown.

use std::fmt::Write as _;

/// A head and rows of as many cells.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) head: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
}

impl Table {
    /// Columns under each other; the first is text, the others are figures.
    pub(super) fn text(&self) -> String {
        let wide: Vec<usize> = (0..self.head.len())
            .map(|column| {
                let cells = self.lines().filter_map(|row| row.get(column));
                cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
            })
            .collect();
        let mut text = String::new();
        for row in self.lines() {
            for (at, (cell, width)) in row.iter().zip(&wide).enumerate() {
                // Writing to a String cannot fail.
                let _ =
                    if at == 0 { write!(text, "{cell:<width$}") } else { write!(text, "  {cell:>width$}") };
            }
            text.push('\n');
        }
        text
    }

    pub(super) fn markdown(&self) -> String {
        let line = |row: &[String]| format!("| {} |\n", row.join(" | "));
        let rule: Vec<String> =
            (0..self.head.len()).map(|at| if at == 0 { "---".into() } else { "---:".into() }).collect();
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        format!("{}{}{rows}", line(&self.head), line(&rule))
    }

    fn lines(&self) -> impl Iterator<Item = &Vec<String>> {
        std::iter::once(&self.head).chain(&self.rows)
    }
}

/// A figure as one reads it: three digits that count, or none.
pub(super) fn shown(value: Option<f64>) -> String {
    match value {
        None => "–".into(),
        Some(value) if value.abs() >= 100.0 || value == 0.0 => format!("{value:.0}"),
        Some(value) if value.abs() >= 10.0 => format!("{value:.1}"),
        Some(value) if value.abs() >= 1.0 => format!("{value:.2}"),
        Some(value) => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_have_every_cell_in_its_column() {
        let cells = |row: [&str; 2]| row.map(str::to_owned).to_vec();
        let table =
            Table { head: cells(["what", "µs"]), rows: vec![cells(["a", "1234"]), cells(["bulk", "–"])] };
        assert_eq!(table.text(), "what    µs\na     1234\nbulk     –\n");
        assert_eq!(table.markdown(), "| what | µs |\n| --- | ---: |\n| a | 1234 |\n| bulk | – |\n");
    }

    #[test]
    fn figures_have_the_digits_that_count() {
        let seen = [Some(1234.5), Some(12.34), Some(1.234), Some(0.1234), Some(0.0), None].map(shown);
        assert_eq!(seen, ["1234", "12.3", "1.23", "0.123", "0", "–"]);
    }
}
