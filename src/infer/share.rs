//! Which replica makes which responses, so that all end at about the same time: the costliest first, each to the replica that has
//! the least to do yet (Graham 1969). Samples of one request stay together where that leaves no replica idle, because they share their
//! prompt. A pure function of the requests, so that all ranks agree; responses do not depend on it.

use super::request::Request;
use super::samples::Sample;
use std::cmp::Reverse;

/// Tokens of a prompt that cost as much as one token of a response: prompts are computed many rows at a time, at several times the rate
/// of decode steps.
const PROMPT_TOKENS_A_TOKEN: usize = 4;

/// Parts of the whole work of a replica below which samples of one request are not divided any more.
const PARTS_A_REPLICA: usize = 8;

/// The samples of replica `replica_idx` of `n_replicas`, in their order. Each of `samples` is one replica's.
pub fn share(requests: &[Request], samples: &[Sample], n_replicas: usize, replica_idx: usize) -> Vec<Sample> {
    let cost = |sample: &Sample| {
        let request = &requests[sample.request_idx];
        request.tokens.len().div_ceil(PROMPT_TOKENS_A_TOKEN) + request.max_new_tokens
    };
    let most = samples.iter().map(cost).sum::<usize>() / (n_replicas * PARTS_A_REPLICA);
    // Runs of samples of one request, of at most that cost.
    let mut runs: Vec<(usize, Vec<Sample>)> = Vec::new();
    for sample in samples {
        match runs.last_mut() {
            Some((of_run, run)) if run[0].request_idx == sample.request_idx && *of_run + cost(sample) <= most => {
                *of_run += cost(sample);
                run.push(*sample);
            }
            _ => runs.push((cost(sample), vec![*sample])),
        }
    }
    runs.sort_by_key(|(cost, _)| Reverse(*cost));
    let mut loads = vec![0; n_replicas];
    let mut mine = Vec::new();
    for (cost, run) in runs {
        let least = (0..n_replicas).min_by_key(|&idx| loads[idx]).expect("at least one replica");
        loads[least] += cost;
        if least == replica_idx {
            mine.extend(run);
        }
    }
    mine.sort();
    mine
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infer::samples::Done;

    fn shares(requests: &[Request], n_replicas: usize) -> Vec<Vec<Sample>> {
        let samples: Vec<Sample> = Done::nothing(requests).missing().collect();
        let shares: Vec<Vec<Sample>> = (0..n_replicas).map(|idx| share(requests, &samples, n_replicas, idx)).collect();
        let mut all = shares.concat();
        all.sort();
        assert_eq!(all, samples, "each sample is made once");
        shares
    }

    /// Every sample has one replica; loads differ by no more than one sample or an eighth of a replica's work, where every n-th to
    /// replica n would give one of them all the long ones.
    #[test]
    fn replicas_have_about_the_same_to_do() {
        for n_replicas in [1, 2, 3, 4] {
            let length = |i: usize| if i % n_replicas == 0 { 400 } else { 10 + i % 7 };
            let requests: Vec<Request> =
                (0..60).map(|i| Request { n: 1 + i % 3, ..Request::new(i.to_string(), vec![1; 5], length(i)) }).collect();
            let load = |share: &Vec<Sample>| share.iter().map(|one| requests[one.request_idx].max_new_tokens + 2).sum::<usize>();
            let loads: Vec<usize> = shares(&requests, n_replicas).iter().map(load).collect();
            let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
            assert!(most - least <= 402.max(most / 8 + 1), "{loads:?}");
        }
    }

    /// Samples of one prompt stay together among many requests, and are divided when they are all there is.
    #[test]
    fn samples_of_one_prompt_stay_together() {
        let request = |id: usize, n| Request { n, ..Request::new(id.to_string(), vec![1; 100], 10) };
        let many: Vec<Request> = (0..100).map(|id| request(id, 4)).collect();
        for share in shares(&many, 4) {
            assert!((0..100).all(|idx| [0, 4].contains(&share.iter().filter(|one| one.request_idx == idx).count())));
        }
        let one = shares(&[request(0, 64)], 4);
        assert!(one.iter().all(|share| share.len() == 16), "{one:?}");
        assert!(shares(&[request(0, 1)], 3).iter().filter(|share| share.is_empty()).count() == 2);
    }
}
