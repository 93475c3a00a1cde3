//! Which solved examples stand before a question, as lm-evaluation-harness draws them.

use super::python::Random;

/// The harness's seed of few-shot examples.
const SEED: u32 = 1234;

/// How examples are drawn.
pub enum Sampler {
    /// The first ones of the file.
    FirstN,
    /// At random; each question goes on with the numbers where the one before it stopped.
    Random(Box<Random>),
}

impl Sampler {
    /// At random, from the harness's seed.
    pub fn random() -> Sampler {
        Sampler::Random(Box::new(Random::new(SEED)))
    }

    /// `n` of `pool` for one question. With `without`, that question itself may be in the pool and is left out. Err: too few.
    pub fn draw<'a, T: PartialEq>(&mut self, pool: &'a [T], n: usize, without: Option<&T>) -> std::result::Result<Vec<&'a T>, String> {
        if n == 0 {
            return Ok(Vec::new());
        }
        let is_other = |one: &&T| without != Some(*one);
        let too_few = |wanted: usize, found: usize| Err(format!("{n} examples need {wanted} rows to draw from, here are {found}"));
        match self {
            Sampler::FirstN => {
                let drawn: Vec<&T> = pool.iter().filter(is_other).take(n).collect();
                if drawn.len() < n { too_few(n, drawn.len()) } else { Ok(drawn) }
            }
            Sampler::Random(random) => {
                // One more, in case the question is among them.
                let wanted = n + usize::from(without.is_some());
                if pool.len() < wanted {
                    return too_few(wanted, pool.len());
                }
                let drawn: Vec<&T> = random.sample(pool.len(), wanted).into_iter().map(|i| &pool[i]).filter(is_other).take(n).collect();
                if drawn.len() == n {
                    return Ok(drawn);
                }
                // The question stood there more than once.
                let others: Vec<&T> = pool.iter().filter(is_other).collect();
                if others.len() < n {
                    return too_few(n, others.len());
                }
                Ok(random.sample(others.len(), n).into_iter().map(|i| others[i]).collect())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A question never stands among its own examples, however often it is in the file, and the right number of others does.
    #[test]
    fn a_question_is_not_its_own_example() {
        let pool = [1, 2, 2, 2, 2, 3, 4, 2];
        for mut sampler in [Sampler::FirstN, Sampler::random()] {
            for _ in 0..50 {
                let drawn = sampler.draw(&pool, 3, Some(&2)).unwrap();
                assert!(drawn.len() == 3 && drawn.iter().all(|&&one| one != 2), "{drawn:?}");
            }
            assert!(sampler.draw(&pool, 4, Some(&2)).unwrap_err().contains("here are 3"));
        }
        assert_eq!(Sampler::FirstN.draw(&pool, 2, None).unwrap(), [&1, &2]);
        assert!(Sampler::random().draw(&pool, 9, None).unwrap_err().contains("here are 8"));
    }
}
