//! Failing histories made short: what is not needed for them to fail is left out (delta debugging).

/// The shortest list found that still fails: first halves are left out, then ever smaller pieces, then single steps.
/// `fails` is asked at most `tries` times.
pub fn shrink<T: Clone>(mut steps: Vec<T>, mut tries: usize, mut fails: impl FnMut(&[T]) -> bool) -> Vec<T> {
    let mut piece = steps.len().div_ceil(2);
    while piece > 0 {
        let mut at = steps.len();
        let before = steps.len();
        // The last steps first: what comes after the failure is never needed.
        while at > 0 && tries > 0 {
            let from = at.saturating_sub(piece);
            let rest = [&steps[..from], &steps[at..]].concat();
            tries -= 1;
            if !rest.is_empty() && fails(&rest) {
                steps = rest;
            }
            at = from;
        }
        if tries == 0 {
            break;
        }
        // Single steps may be left out once others are gone.
        if piece > 1 || steps.len() == before {
            piece /= 2;
        }
    }
    steps
}

#[test]
fn a_failing_list_is_made_as_short_as_it_can_be() {
    // A later step fails only behind two earlier ones, in this order.
    let fails = |steps: &[u32]| {
        let at = |wanted| steps.iter().position(|step| *step == wanted);
        matches!((at(3), at(17), at(40)), (Some(a), Some(b), Some(c)) if a < b && b < c)
    };
    assert_eq!(shrink((0..60).collect(), 1000, fails), [3, 17, 40]);
    let mut asked = 0;
    let steps = shrink((0..60).collect(), 5, |steps| {
        asked += 1;
        fails(steps)
    });
    assert!(fails(&steps) && asked == 5, "{asked}: {steps:?}");
}
