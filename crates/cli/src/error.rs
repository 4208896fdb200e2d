//! What was not done, why, and what would help.

use std::{fmt, process::ExitCode};

use protobuf::Message;
use serde_json::{Value, json};
use transship_api::control;

use crate::report;

#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// What was not done, as a sentence's beginning: `redis was not moved`.
    pub what: String,
    /// At least one, the most fundamental first.
    pub reasons: Vec<Reason>,
    /// Where things stand now; empty when nothing was touched.
    pub outcome: String,
    /// The ending of a migration; empty otherwise.
    pub ending: String,
    /// What there is to tell of a migration that got as far as moving memory.
    pub report: Option<Box<control::Report>>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Reason {
    pub code: String,
    pub reason: String,
    pub remedy: String,
}

impl Failure {
    pub fn new(what: impl Into<String>, reasons: Vec<Reason>) -> Self {
        let (outcome, ending) = Default::default();
        Self { what: what.into(), reasons, outcome, ending, report: None }
    }

    /// An answer that was an error. The agent's refusals travel beside the
    /// text of the status.
    pub fn from_call(what: impl Into<String>, error: &ttrpc::Error) -> Self {
        let reasons = match error {
            ttrpc::Error::RpcStatus(status) => {
                let told: Vec<_> = status
                    .details
                    .iter()
                    .filter_map(|any| control::Refusal::parse_from_bytes(&any.value).ok())
                    .map(Reason::from)
                    .collect();
                if told.is_empty() { vec![Reason::internal(&status.message)] } else { told }
            }
            other => vec![Reason {
                code: "link".into(),
                reason: format!("the connection with transshipd broke: {other}"),
                remedy: "see whether transshipd runs (systemctl status transshipd)".into(),
            }],
        };
        Self::new(what, reasons)
    }

    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(if self.ending == "in-doubt" { 3 } else { 1 })
    }

    pub fn json(&self) -> Value {
        let mut reasons = self.reasons.iter().map(Reason::json);
        let mut error = reasons.next().unwrap_or_else(|| Reason::internal("unknown").json());
        error["what"] = self.what.clone().into();
        let others: Vec<_> = reasons.collect();
        if !others.is_empty() {
            error["others"] = others.into();
        }
        for (name, text) in [("outcome", &self.outcome), ("ending", &self.ending)] {
            if !text.is_empty() {
                error[name] = text.clone().into();
            }
        }
        if let Some(report) = &self.report {
            error["report"] = report::as_json(report);
        }
        json!({ "error": error })
    }
}

impl Reason {
    fn internal(text: &str) -> Self {
        Self { code: "internal".into(), reason: text.into(), remedy: "see transshipd's log".into() }
    }

    fn json(&self) -> Value {
        json!({ "code": self.code, "reason": self.reason, "remedy": self.remedy })
    }
}

impl From<control::Refusal> for Reason {
    fn from(refusal: control::Refusal) -> Self {
        let control::Refusal { code, reason, remedy, .. } = refusal;
        Self { code, reason, remedy }
    }
}

/// For people, on several lines.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        for Reason { code, reason, remedy } in &self.reasons {
            write!(f, "\n  why: {reason} ({code})")?;
            if !remedy.is_empty() {
                write!(f, "\n  remedy: {remedy}")?;
            }
        }
        if !self.outcome.is_empty() {
            write!(f, "\n  now: {}", self.outcome)?;
        }
        // Without rounds there is nothing that the reasons do not say.
        let report = self.report.iter().filter(|report| !report.memory.rounds.is_empty());
        for line in report.flat_map(|report| report::figures(report)) {
            write!(f, "\n{line}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(n: u8) -> Reason {
        Reason { code: format!("c{n}"), reason: format!("r{n}"), remedy: format!("m{n}") }
    }

    #[test]
    fn json_has_the_first_reason_where_programs_look() {
        let mut failure = Failure::new("x was not moved", vec![reason(1), reason(2)]);
        failure.ending = "stayed-home".into();
        assert_eq!(
            failure.json(),
            json!({ "error": {
                "what": "x was not moved", "code": "c1", "reason": "r1", "remedy": "m1",
                "others": [{ "code": "c2", "reason": "r2", "remedy": "m2" }],
                "ending": "stayed-home",
            }})
        );
    }

    #[test]
    fn people_read_what_why_and_the_remedy() {
        let mut failure = Failure::new("x was not moved", vec![reason(1)]);
        failure.outcome = "x is RUNNING on a".into();
        assert_eq!(
            failure.to_string(),
            "x was not moved\n  why: r1 (c1)\n  remedy: m1\n  now: x is RUNNING on a"
        );
        let mut report = control::Report::default();
        failure.report = Some(Box::new(report.clone()));
        assert!(!failure.to_string().contains("sent"), "{failure}");
        report.memory.mut_or_insert_default().rounds.push(Default::default());
        failure.report = Some(Box::new(report));
        assert!(failure.to_string().contains("ROUND"), "{failure}");
        assert!(failure.json()["error"]["report"].is_object());
    }

    #[test]
    fn refusals_are_found_beside_the_text_of_a_status() {
        let refusal = control::Refusal {
            code: "busy".into(),
            reason: "it moves".into(),
            ..Default::default()
        };
        let mut status = ttrpc::get_status(ttrpc::Code::FAILED_PRECONDITION, "text");
        let value = refusal.write_to_bytes().unwrap();
        status.details.push(ttrpc::proto::Any { value, ..Default::default() });
        let failure = Failure::from_call("x", &ttrpc::Error::RpcStatus(status));
        assert_eq!(failure.reasons[0].code, "busy");
    }
}
