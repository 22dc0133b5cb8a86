--- Whether a request that has failed may be sent to another peer.
--
-- Why: nginx decides by what the site says, which holds for all upstreams alike. An upstream that
-- has a policy of its own gets it in two ways. What it forbids is refused here, when nginx asks for
-- the next peer. What it adds happens in the location that failures are led to, where nginx would
-- try again in any case and leaves the rest to this module. See `tidegate.hold`.

local balancer = require "ngx.balancer"
local metrics = require "tidegate.metrics"

local ceil = math.ceil
local find = string.find
local floor = math.floor
local get_method = ngx.req.get_method
local huge = math.huge
local ipairs = ipairs
local min = math.min
local now = ngx.now
local set_more_tries = balancer.set_more_tries
local var = ngx.var

local MAX_TRIES = 5
local SLICES = 10           -- of a second each: the window of the budget
local NOT_IDEMPOTENT = { POST = true, PATCH = true, LOCK = true }
local DEFAULT = { error = true, timeout = true }

local _M = {
    pending = 0,            -- requests under way in this worker that were sent to another peer
}


--- Adds what this module keeps with an opened version.
-- @param candidates peers that a request might be sent to
function _M.open(upstream, before, candidates)
    local policy = upstream.policy.retry
    local tries = min(candidates, policy.tries > 0 and policy.tries or MAX_TRIES)
    local on, statuses
    if #policy.on > 0 then
        on, statuses = {}, false
        for _, word in ipairs(policy.on) do
            on[word] = true
            statuses = statuses or find(word, "^http_") ~= nil
        end
    end
    upstream.tries = tries > 1 and tries
    upstream.retry_on = on
    upstream.retry_led = statuses and tries > 1
    upstream.retry_any = upstream.retry_led and (on.http_403 or on.http_404 or on.http_429)
    upstream.budget = policy.budget > 0 and (before and before.budget or {
        newest = 0, requests = {}, retries = {}, all_requests = 0, all_retries = 0,
    })
end


-- Lets go of slices that are too old.
local function advance(budget)
    local newest = floor(now())
    local first = budget.newest + 1
    if newest - first >= SLICES then
        first = newest - SLICES + 1
        budget.all_requests, budget.all_retries = 0, 0
        budget.requests, budget.retries = {}, {}
    end
    for slice = first, newest do
        local place = slice % SLICES
        budget.all_requests = budget.all_requests - (budget.requests[place] or 0)
        budget.all_retries = budget.all_retries - (budget.retries[place] or 0)
        budget.requests[place], budget.retries[place] = 0, 0
    end
    budget.newest = newest
    return newest % SLICES
end


--- Counts a request to an upstream that has a budget.
function _M.count(upstream)
    local budget = upstream.budget
    local place = advance(budget)
    budget.requests[place] = budget.requests[place] + 1
    budget.all_requests = budget.all_requests + 1
end


-- Whether the budget of this worker has a retry left; with `take` it is used.
local function afford(upstream, take)
    local budget = upstream.budget
    if not budget then
        return true
    end
    local place = advance(budget)
    if budget.all_retries + 1 > ceil(upstream.policy.retry.budget * budget.all_requests) then
        metrics.add(upstream.name, metrics.BUDGET_EXHAUSTED)
        return false
    end
    if take then
        budget.retries[place] = budget.retries[place] + 1
        budget.all_retries = budget.all_retries + 1
    end
    return true
end


local function kind_of(attempt)
    if attempt.answered then
        return "http_" .. attempt.status
    elseif attempt.status == 504 then
        return "timeout"
    end
    return attempt.received > 0 and "invalid_header" or "error"
end


--- Whether a request to `upstream` may be sent on after what `made` says of it.
-- @param made as `attempts.read` gives it
-- @param led whether nginx would send it on in any case, so that the site has had no say
function _M.allowed(upstream, made, led)
    local policy, on, last = upstream.policy.retry, upstream.retry_on, made[#made]
    if not last then
        return false
    end
    if on or led then
        local words = on or var.tidegate_retry ~= "off" and DEFAULT
        if not words or not words[kind_of(last)] then
            return false
        end
        local seconds, sent = 0, false
        for _, attempt in ipairs(made) do
            seconds = seconds + attempt.seconds
            sent = sent or attempt.sent > 0
        end
        if sent and NOT_IDEMPOTENT[get_method()] and not words.non_idempotent then
            return false
        end
    end
    if #made >= (policy.tries > 0 and policy.tries or on and MAX_TRIES or huge) then
        return false
    end
    if policy.timeout > 0 then
        local seconds = 0
        for _, attempt in ipairs(made) do
            seconds = seconds + attempt.seconds
        end
        if seconds >= policy.timeout then
            metrics.add(upstream.name, metrics.RETRY_TOO_LATE)
            return false
        end
    end
    return afford(upstream, true)
end


--- Whether an answer may send the current request on to another peer, so that it has to go through
-- the location where nginx does that.
function _M.heeds_answers(upstream)
    return upstream.retry_led
        and (upstream.retry_on.non_idempotent or not NOT_IDEMPOTENT[get_method()])
end


--- Takes note that a request is sent to another peer.
-- @param name of its upstream
function _M.note(name)
    metrics.add(name, metrics.RETRIES)
    if var.tidegate_retried ~= "1" then
        var.tidegate_retried = "1"
        _M.pending = _M.pending + 1
    end
end


--- Tells nginx how many peers it may ask, at the first one.
-- @param led as for `allowed`
-- @param spare another upstream whose peers may be asked after those of `upstream`; nil for none
function _M.grant(upstream, led, spare)
    local tries = upstream.tries
    if spare then
        tries = min((tries or 1) + (spare.tries or 1), MAX_TRIES)
    end
    if not tries or led and not _M.heeds_answers(upstream) then
        -- nginx would take any answer there for a failure, and lose it. This way what the peer
        -- answers is passed on, and what fails comes back to `hold`.
        return
    end
    -- An answer that may not be asked for again is passed on only by the last try.
    if not led or afford(upstream) then
        set_more_tries(tries)
    end
end


return _M
