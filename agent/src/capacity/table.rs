//! A report for people: rows and footnotes; aligning them is the command line's.

use super::calibration::Cpu;
use super::flow::Way;
use super::model::{Figure, Prediction, SYMBOLS};
use super::scenario::Scenario;
use super::{Report, Row};

/// One cluster's table.
#[derive(Debug)]
pub struct Block {
    /// The cluster in a line.
    pub title: String,
    /// One row for each way.
    pub rows: Vec<Vec<String>>,
    /// What is the same in every way.
    pub below: String,
}

/// The columns.
pub const HEADS: [&str; 9] = [
    "WAY",
    "HANDSHAKES/S",
    "FULL/S",
    "PROOFS/S",
    "CONNECTIONS",
    "TLS CORES",
    "PER NODE",
    "MEMORY/NODE",
    "OVERHEAD",
];

/// The machine, in lines.
pub fn machine(report: &Report) -> String {
    let c = &report.calibration;
    let micros = |seconds: f64| amount(seconds * 1e6);
    let mut text = format!(
        "{}, {} cores, {}; a core does:\n  full handshake {} us client + {} us server, {} on the wire\n  \
         resumed {} us + {} us, {}\n  records {}/s sealed, {}/s opened\n  \
         identity proof {} us to make, {} us to verify; SVID {} us to ask for, {} us to issue\n  \
         memory {} for an end of a connection, {} for an end of a stream\n",
        c.cpu.model,
        c.cpu.cores,
        features(&c.cpu),
        micros(c.full.client_cpu_seconds),
        micros(c.full.server_cpu_seconds),
        bytes(c.full.wire_bytes),
        micros(c.resumed.client_cpu_seconds),
        micros(c.resumed.server_cpu_seconds),
        bytes(c.resumed.wire_bytes),
        bytes(c.seal_bytes_per_second),
        bytes(c.open_bytes_per_second),
        micros(c.prove_cpu_seconds),
        micros(c.verify_cpu_seconds),
        micros(c.request_cpu_seconds),
        micros(c.issue_cpu_seconds),
        bytes(c.tunnel_bytes),
        bytes(c.stream_bytes),
    );
    if !c.cpu.aes {
        text.push_str(
            "  NO AES INSTRUCTIONS: bytes cost several times what they cost with them (ChaCha20-Poly1305 is used)\n",
        );
    }
    text
}

fn features(cpu: &Cpu) -> String {
    let with = [("AES", cpu.aes), ("AVX2", cpu.avx), ("VAES", cpu.vaes)]
        .map(|(name, has)| if has { format!("with {name}") } else { format!("without {name}") });
    with.join(", ")
}

/// The clusters, in the report's order.
pub fn blocks(report: &Report) -> Vec<Block> {
    report.scenarios.iter().map(block).collect()
}

fn block(row: &Row) -> Block {
    let below = row.ways.first().map_or_else(String::new, |any| {
        format!(
            "issuing {} SVIDs/s takes {} cores of the authority",
            amount(any.issuances.value),
            amount(any.authority_cores.value)
        )
    });
    Block { title: title(&row.scenario), rows: row.ways.iter().map(cells).collect(), below }
}

fn title(s: &Scenario) -> String {
    let services = s.services as f64;
    format!(
        "{} services, {} pods, {} nodes: {} connections/s, {}/s",
        amount(services),
        amount(s.pods as f64),
        amount(s.nodes as f64),
        amount(services * s.connections_per_second_per_service),
        bytes(services * s.bytes_per_second_per_service),
    )
}

fn cells(p: &Prediction) -> Vec<String> {
    vec![
        p.way.name().into(),
        amount(p.handshakes.value),
        amount(p.full_handshakes.value),
        amount(p.proofs.value),
        amount(p.connections.value),
        amount(p.cores.value),
        amount(p.cores_per_node.value),
        bytes(p.memory_per_node.value),
        format!("{} %", amount(100.0 * p.overhead_share.value)),
    ]
}

/// What was assumed, and every formula.
pub fn footnotes(report: &Report) -> String {
    let mut text = String::new();
    let Some(row) = report.scenarios.first() else { return text };
    let s = &row.scenario;
    text.push_str(&format!(
        "Assumed: each service opens {} connections/s, {}/s of payload, to {} services; a connection lasts {} s;\n\
         {} threads an agent; idle timeout {} s; SVIDs valid {} s; zones that traffic stays within: {}. Each has a flag.\n\
         Counted are TLS and its HTTP/2 framing; what relaying costs besides is the same in every way. Traffic\n\
         within a node is counted as if it left the node. {}\n\n",
        amount(s.connections_per_second_per_service),
        bytes(s.bytes_per_second_per_service),
        s.fan_out,
        amount(s.connection_seconds),
        s.threads,
        amount(s.idle_timeout_seconds),
        amount(s.certificate_lifetime_seconds),
        s.zones,
        super::ERROR,
    ));
    type Column = (&'static str, fn(&Prediction) -> Figure);
    let columns: [Column; 12] = [
        ("keys", |p| p.keys),
        ("handshakes/s", |p| p.handshakes),
        ("full/s", |p| p.full_handshakes),
        ("proofs/s", |p| p.proofs),
        ("connections", |p| p.connections),
        ("handshake cores", |p| p.handshake_cores),
        ("payload cores", |p| p.payload_cores),
        ("TLS cores", |p| p.cores),
        ("memory", |p| p.memory),
        ("certificate storage", |p| p.certificate_storage),
        ("overhead", |p| p.overhead),
        ("authority cores", |p| p.authority_cores),
    ];
    for (name, figure) in columns {
        text.push_str(&format!("{name}: "));
        let formulas: Vec<(Way, &str)> = row.ways.iter().map(|p| (p.way, figure(p).formula)).collect();
        if let [(_, first), rest @ ..] = &formulas[..]
            && rest.iter().all(|(_, formula)| formula == first)
        {
            text.push_str(&format!("{first}\n"));
            continue;
        }
        text.push('\n');
        for (way, formula) in formulas {
            text.push_str(&format!("  {:15}  {formula}\n", way.name()));
        }
    }
    text.push_str("where\n");
    for (symbol, meaning) in SYMBOLS {
        text.push_str(&format!("  {symbol:18} {meaning}\n"));
    }
    text
}

/// Three digits, and commas: 0.0123, 12.3, 1,234.
fn amount(value: f64) -> String {
    if value >= 99.95 {
        let whole = format!("{value:.0}");
        let mut text = String::new();
        for (at, digit) in whole.char_indices() {
            if at > 0 && (whole.len() - at) % 3 == 0 {
                text.push(',');
            }
            text.push(digit);
        }
        return text;
    }
    if value < 1e-6 {
        return "0".into();
    }
    let decimals = (2 - value.log10().floor() as i32).clamp(0, 9) as usize;
    let text = format!("{value:.decimals$}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Bytes in decimal units.
fn bytes(value: f64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let (mut value, mut at) = (value, 0);
    while value >= 999.5 && at + 1 < units.len() {
        value /= 1000.0;
        at += 1;
    }
    format!("{} {}", amount(value), units[at])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (0.012_34, "0.0123"),
            (1.0, "1"),
            (12.34, "12.3"),
            (99.99, "100"),
            (1_234_567.8, "1,234,568"),
        ] {
            assert_eq!(amount(value), text, "{value}");
        }
        for (value, text) in [(12.0, "12 B"), (999.7, "1 kB"), (7.3e9, "7.3 GB"), (5e17, "500 PB")] {
            assert_eq!(bytes(value), text, "{value}");
        }
    }
}
