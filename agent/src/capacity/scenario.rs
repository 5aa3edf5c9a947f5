//! A cluster in numbers: what the operator says, defaults for the rest, and what is refused.

use serde::Serialize;

use super::CapacityError;

/// More of anything than this is a slip of the finger; below it no product leaves a float's range.
const MOST: f64 = 1e9;

/// How a cluster's numbers follow from its number of services. The defaults are those of the scale
/// Hauberk is planned for: 10,000 services, 100,000 pods, 5,000 nodes, 100,000 connections a second.
#[derive(Clone, Debug)]
pub struct Ratios {
    /// All pods, instead of so many for each service.
    pub pods: Option<u64>,
    /// All nodes, instead of so many pods on each.
    pub nodes: Option<u64>,
    /// Pods of a service.
    pub pods_per_service: u64,
    /// Pods on a node.
    pub pods_per_node: u64,
    /// New connections that each service opens in a second.
    pub connections_per_second: f64,
    /// Payload of the connections that each service opens, both directions together.
    pub bytes_per_second: f64,
    /// How long a connection stays open.
    pub connection_seconds: f64,
    /// How many services each service talks to.
    pub fan_out: u64,
    /// Zones that traffic stays within.
    pub zones: u64,
    /// Data-path threads of an agent; as many as it starts on the calibrated machine if not given.
    pub threads: Option<u64>,
    /// `tunnel.idleTimeoutSeconds`.
    pub idle_timeout_seconds: f64,
    /// `svidLifetimeSeconds`.
    pub certificate_lifetime_seconds: f64,
}

impl Default for Ratios {
    fn default() -> Self {
        Self {
            pods: None,
            nodes: None,
            pods_per_service: 10,
            pods_per_node: 20,
            connections_per_second: 10.0,
            bytes_per_second: 100_000.0,
            connection_seconds: 1.0,
            fan_out: 10,
            zones: 1,
            threads: None,
            idle_timeout_seconds: 300.0,
            certificate_lifetime_seconds: 3600.0,
        }
    }
}

/// A cluster. Every number is within a range that the model's arithmetic holds for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scenario {
    /// Services; each has an identity of its own.
    pub services: u64,
    /// Pods of all services, spread evenly over the nodes.
    pub pods: u64,
    /// Nodes.
    pub nodes: u64,
    /// New connections that each service opens in a second.
    pub connections_per_second_per_service: f64,
    /// Payload of the connections that each service opens, both directions together.
    pub bytes_per_second_per_service: f64,
    /// How long a connection stays open.
    pub connection_seconds: f64,
    /// How many services each service talks to; no more than there are.
    pub fan_out: u64,
    /// Zones that traffic stays within.
    pub zones: u64,
    /// Data-path threads of an agent, each with its own pool.
    pub threads: u64,
    /// A pooled connection without streams is closed after this.
    pub idle_timeout_seconds: f64,
    /// How long an SVID is valid; it is renewed at half of that.
    pub certificate_lifetime_seconds: f64,
}

impl Ratios {
    /// A cluster of so many services.
    ///
    /// # Errors
    /// When a number is out of its range; the message names its flag.
    pub fn scenario(&self, services: u64, default_threads: u64) -> Result<Scenario, CapacityError> {
        count("--services", services)?;
        count("--pods-per-service", self.pods_per_service)?;
        count("--pods-per-node", self.pods_per_node)?;
        let pods = self.pods.unwrap_or_else(|| services.saturating_mul(self.pods_per_service));
        let nodes = self.nodes.unwrap_or_else(|| pods.div_ceil(self.pods_per_node));
        let scenario = Scenario {
            services,
            pods: count("--pods", pods)?,
            nodes: count("--nodes", nodes)?,
            connections_per_second_per_service: number(
                "--connections-per-second",
                self.connections_per_second,
                0.0,
            )?,
            bytes_per_second_per_service: number("--bytes-per-second", self.bytes_per_second, 0.0)?,
            connection_seconds: number("--connection-seconds", self.connection_seconds, 0.0)?,
            fan_out: count("--fan-out", self.fan_out)?.min(services),
            zones: count("--zones", self.zones)?,
            threads: count("--threads", self.threads.unwrap_or(default_threads))?,
            idle_timeout_seconds: number("--idle-timeout", self.idle_timeout_seconds, 1.0)?,
            certificate_lifetime_seconds: number(
                "--certificate-lifetime",
                self.certificate_lifetime_seconds,
                60.0,
            )?,
        };
        let refuse = |field, value: u64, message| {
            Err(CapacityError::Invalid { field, value: value.to_string(), message })
        };
        if scenario.pods < services {
            return refuse("--pods", scenario.pods, "each service has at least one pod");
        }
        if scenario.zones > scenario.nodes {
            return refuse("--zones", scenario.zones, "there cannot be more zones than nodes");
        }
        if scenario.threads > 1024 {
            return refuse("--threads", scenario.threads, "an agent has at most 1024 threads");
        }
        Ok(scenario)
    }
}

fn count(field: &'static str, value: u64) -> Result<u64, CapacityError> {
    if value == 0 || value as f64 > MOST {
        let message = "it must be between 1 and 1,000,000,000";
        return Err(CapacityError::Invalid { field, value: value.to_string(), message });
    }
    Ok(value)
}

fn number(field: &'static str, value: f64, least: f64) -> Result<f64, CapacityError> {
    // Not a number is in no range.
    if (least..=MOST).contains(&value) {
        return Ok(value);
    }
    let message = match least {
        60.0 => "it must be at least 60 seconds, and at most 1,000,000,000",
        1.0 => "it must be at least 1 second, and at most 1,000,000,000",
        _ => "it must be between 0 and 1,000,000,000",
    };
    Err(CapacityError::Invalid { field, value: value.to_string(), message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_scale_it_is_planned_for() {
        let planned = Ratios::default().scenario(10_000, 8).unwrap();
        assert_eq!((planned.pods, planned.nodes, planned.threads), (100_000, 5_000, 8));
        let small = Ratios::default().scenario(3, 8).unwrap();
        assert_eq!(small.fan_out, 3, "nobody talks to more services than there are");
    }

    #[test]
    fn what_no_cluster_has_is_refused_by_the_name_of_its_flag() {
        let refused = |change: fn(&mut Ratios)| {
            let mut ratios = Ratios::default();
            change(&mut ratios);
            ratios.scenario(100, 2).unwrap_err().to_string()
        };
        for (flag, text) in [
            ("--pods", refused(|r| r.pods = Some(99))),
            ("--pods", refused(|r| r.pods_per_service = u64::MAX)),
            ("--nodes", refused(|r| r.nodes = Some(0))),
            ("--zones", refused(|r| r.zones = 51)),
            ("--threads", refused(|r| r.threads = Some(2000))),
            ("--fan-out", refused(|r| r.fan_out = 0)),
            ("--connections-per-second", refused(|r| r.connections_per_second = -1.0)),
            ("--bytes-per-second", refused(|r| r.bytes_per_second = f64::INFINITY)),
            ("--connection-seconds", refused(|r| r.connection_seconds = f64::NAN)),
            ("--idle-timeout", refused(|r| r.idle_timeout_seconds = 0.5)),
            ("--certificate-lifetime", refused(|r| r.certificate_lifetime_seconds = 59.0)),
        ] {
            assert!(text.starts_with(flag), "the message names {flag}: {text}");
        }
    }
}
