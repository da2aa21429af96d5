import random, time
from tests.test_broker_faults import *
def test_x(tmp_path):
    with running_brokers(tmp_path, 2) as (one, two):
        rng = new_rng()
        transactions = make_transactions(rng, 5000, large=0.05)
        source, receiver = Source(one, rng, transactions), Receiver(two)
        for k in range(10):
            seen, wanted = len(receiver.ledger.transactions), rng.randint(1, 300)
            t=time.time()
            try:
                until(lambda: len(receiver.ledger.transactions) >= min(seen + wanted, len(transactions)),
                lambda: source.step(rng.randint(1, 40)), lambda: receiver.step(0.001), within_s=25)
            except AssertionError:
                print("STUCK", source.done, source.durable, source.told, receiver.ledger.head, receiver._link, source._pending, len(source._in_flight)); 
                print(one.status()); print(two.status())
                print(one.log()[-3000:]); print("--------"); print(two.log()[-4000:])
                raise
            print(k, round(time.time()-t,1), len(receiver.ledger.transactions), source.done, source.durable, receiver.reopened, time.strftime("%H:%M:%S"))
            victim = rng.choice([one, two, two])
            source.step(rng.randint(1, 200))
            print("kill", victim.name)
            victim.kill()
            if rng.random() < 0.3:
                receiver.reopen()
            victim.start()
