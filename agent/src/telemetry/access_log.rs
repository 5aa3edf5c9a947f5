//! One structured line for each finished connection.

/// Writes the line.
pub fn write(_record: &super::Finished<'_>) {}
