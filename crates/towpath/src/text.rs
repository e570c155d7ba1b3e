//! Text for people: tables with columns as wide as their widest cell, units, and what a misspelt name may have meant.

/// Lays out `rows` under `heads`; columns whose head starts with `>` are aligned to the right.
pub fn table(heads: &[&str], rows: &[Vec<String>]) -> String {
    let right: Vec<bool> = heads.iter().map(|head| head.starts_with('>')).collect();
    let heads: Vec<String> = heads.iter().map(|head| head.trim_start_matches('>').to_string()).collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).chain(heads.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let mut text = String::new();
    for row in std::iter::once(&heads).chain(rows) {
        let cells = row.iter().zip(&widths).zip(&right).map(|((cell, &width), &right)| match right {
            true => format!("{cell:>width$}"),
            false => format!("{cell:<width$}"),
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Bytes in the unit that suits them.
pub fn bytes(count: u64) -> String {
    match count {
        0..1024 => format!("{count} B"),
        1024..1_048_576 => format!("{:.1} KiB", count as f64 / 1024.0),
        _ => format!("{:.1} MiB", count as f64 / 1_048_576.0),
    }
}

/// A span of time in its two largest units.
pub fn span(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

/// A cell for something that may be absent.
pub fn or_dash<T: ToString>(value: &Option<T>) -> String {
    value.as_ref().map_or("-".into(), T::to_string)
}

/// The names nearest to one that does not exist, or all there are, to go behind an error.
pub fn suggestion(names: &[&str], wanted: &str) -> String {
    let mut near: Vec<_> = names.iter().map(|name| (strsim::damerau_levenshtein(name, wanted), *name)).collect();
    near.sort();
    let near: Vec<_> = near.into_iter().filter(|(distance, _)| *distance <= 2).take(3).map(|(_, name)| name).collect();
    match (near.is_empty(), names.is_empty()) {
        (false, _) => format!("; did you mean {}?", near.join(" or ")),
        (true, false) => format!("; there are {}", names.join(", ")),
        (true, true) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["eth0".into(), "1".into(), "a".into()], vec!["e".into(), "1000".into(), "".into()]];
        assert_eq!(table(&["port", ">packets", "x"], &rows), "port  packets  x\neth0        1  a\ne        1000\n");
    }

    #[test]
    fn units() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(64 << 20), "64.0 MiB");
        assert_eq!(span(59), "59 s");
        assert_eq!(span(3661), "1 h 1 min");
        assert_eq!(span(90000), "1 d 1 h");
    }
}
