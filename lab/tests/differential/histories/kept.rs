//! Histories that once failed. They are run first, each as a test of its own would be.

/// A name that says what was wrong, and the steps.
pub const KEPT: &[(&str, &[&str])] = &[
    (
        "check asked Linux for 0.0.0.0 and 255.255.255.255 where there is a default route",
        &["route add 0.0.0.0/0 via 192.0.2.10"],
    ),
    (
        "check compared the tables with what Linux does by rules that the tables do not have",
        &[
            "ip -6 rule add to 2001:db8:101::/48 priority 101 prohibit",
            "rule add to 198.18.1.0/24 priority 101 prohibit",
        ],
    ),
];
