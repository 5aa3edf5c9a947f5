//! What the agent says of itself to the rest of the cluster.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::utsname::uname;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::State;
use crate::enrol::Standing;
use crate::fleet::reach::Reach;
use crate::fleet::report::{MAX_LISTED, Report};

impl State {
    /// What holds now.
    pub fn report(&self, reach: &Reach) -> Report {
        let enrolled = self.enrolled.now();
        let reasons = enrolled.iter().filter_map(|(name, how)| Some(format!("{name}: {}", how.fault()?)));
        let not_enrolled: Vec<String> = reasons.collect();
        let rotation = self.rotation.now();
        let failures =
            rotation.iter().filter_map(|(id, how)| Some(format!("{id}: {}", how.last_error.as_ref()?)));
        let now = SystemTime::now();
        // Whoever should have been renewed by now.
        let late = rotation.values().filter(|how| how.last_error.is_some() || how.not_after <= Some(now));
        let looks = reach.now();
        let trust = self.trust.snapshot();
        let roots = trust.bundle.roots().iter().filter_map(|root| X509Certificate::from_der(root).ok());
        let unix = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Report {
            version: env!("CARGO_PKG_VERSION").into(),
            kernel: uname().map_or_else(|_| "?".into(), |it| it.release().to_string_lossy().into_owned()),
            missing: self.readiness.missing().iter().map(|(name, why)| format!("{name}: {why}")).collect(),
            policies: self.policies.digest().map(|digest| digest.as_str().to_owned()),
            policy_fault: self.policies.fault(),
            directory_fault: self.directory.standing().faults(),
            enrolled: enrolled.values().filter(|how| **how == Standing::Enrolled).count(),
            not_enrolled: not_enrolled.len(),
            why_not_enrolled: not_enrolled.into_iter().take(MAX_LISTED).collect(),
            roots_until: roots
                .filter_map(|(_, root)| root.validity().not_after.timestamp().try_into().ok())
                .min(),
            svids_until: late.filter_map(|how| how.not_after).map(unix).min(),
            svid_failures: failures.take(MAX_LISTED).collect(),
            not_reached: looks.iter().filter_map(|(node, why)| Some((node.clone(), why.clone()?))).collect(),
            looked_for: looks.into_iter().map(|(node, _)| node).collect(),
        }
    }
}
