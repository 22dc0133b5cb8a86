--- What becomes of a request that could not be sent to a peer, or whose peers all failed.
--
-- Why: nginx turns that into a 5xx of its own; `conf.d/server.inc` leads it here. Where a
-- replacement is expected (`hold` of the upstream) the request waits and goes on; else it is
-- answered. None of this costs anything as long as requests succeed.

local attempts = require "tidegate.attempts"
local balancer = require "tidegate.balancer"
local circuit = require "tidegate.circuit"
local health = require "tidegate.health"
local last_resort = require "tidegate.last_resort"
local metrics = require "tidegate.metrics"
local probe = require "tidegate.probe"
local queue = require "tidegate.queue"
local retry = require "tidegate.retry"
local selection = require "tidegate.selection"

local get_method = ngx.req.get_method
local gsub = string.gsub
local ipairs = ipairs
local min = math.min
local ngx = ngx
local now = ngx.now
local on_abort = ngx.on_abort
local set_uri = ngx.req.set_uri
local sleep = ngx.sleep
local sub = string.sub
local tonumber = tonumber
local var = ngx.var

-- nginx allows 10 internal redirects per request.
local MAX_ATTEMPTS = 8
-- Where each attempt takes two of them.
local MAX_ATTEMPTS_ELSEWHERE = 3
-- While peers are there and refuse, they are more likely broken than on their way.
local REFUSING_LIMIT = 5
-- Longer than a replacement commonly takes that is started once the old one has ended.
local HOLD_BEFORE_DRAINING = 3
local RETRY_AFTER = 5
local GRPC_DEADLINE_EXCEEDED = 4
local GRPC_UNAVAILABLE = 14
local IDEMPOTENT = {
    GET = true, HEAD = true, OPTIONS = true, TRACE = true, PUT = true, DELETE = true,
}
local REASONS = {
    [403] = "Forbidden",
    [404] = "Not Found",
    [429] = "Too Many Requests",
    [500] = "Internal Server Error",
    [502] = "Bad Gateway",
    [503] = "Service Unavailable",
    [504] = "Gateway Time-out",
}
local TEXTS = {
    [502] = "The application did not answer properly.",
    [503] = "No instance of the application can take the request right now.",
    [504] = "The application did not answer in time.",
}

local _M = {}

local max_held = 4096
local held = 0
local pages = { default = "{{status}} {{reason}}\n" }


--- Sets how many requests may wait in a worker at a time.
function _M.set_limit(count)
    max_held = count
end


--- Sets the error page: HTML with `{{status}}`, `{{reason}}` and `{{text}}`.
-- @param status that it is for; nil: all that have none of their own
function _M.set_page(text, status)
    pages[status or "default"] = text
end


-- Tells a gRPC client. A time-out is told apart, since what ran into it may have been done.
local function answer_grpc(status)
    ngx.status = 200
    ngx.header["Content-Type"] = "application/grpc"
    ngx.header["grpc-status"] = status == 504 and GRPC_DEADLINE_EXCEEDED or GRPC_UNAVAILABLE
    ngx.header["grpc-message"] = TEXTS[status] or "Something went wrong on the way."
    -- Only so does the answer end with its head, as gRPC wants it.
    ngx.header["Content-Length"] = 0
    return ngx.exit(ngx.HTTP_OK)
end


local function answer(status, retry_after)
    if var.tidegate_grpc == "1" then
        return answer_grpc(status)
    end
    local values = {
        status = status,
        reason = REASONS[status] or "Error",
        text = TEXTS[status] or "Something went wrong on the way to the application.",
    }
    ngx.status = status
    if status == 503 then
        ngx.header["Retry-After"] = retry_after or RETRY_AFTER
    end
    ngx.header["Content-Type"] = "text/html; charset=utf-8"
    ngx.header["Cache-Control"] = "no-store"
    local body = gsub(pages[status] or pages.default, "{{(%a+)}}", values)
    ngx.header["Content-Length"] = #body
    ngx.print(body)
    return ngx.exit(ngx.HTTP_OK)
end


-- Whether a byte of the request has reached a peer.
local function was_sent(made)
    for _, attempt in ipairs(made) do
        if attempt.sent > 0 then
            return true
        end
    end
    return false
end


-- Whether the request can be sent once more: what was streamed is not there any more.
local function is_repeatable()
    if var.tidegate_streamed ~= "1" then
        return true
    end
    local method = get_method()
    return var.tidegate_grpc ~= "1" and (method == "GET" or method == "HEAD")
        and (var.http_content_length or "0") == "0" and not var.http_transfer_encoding
end


-- Before a request goes through the named location: there is no location prefix to take off there.
local function strip_prefix()
    local prefix = var.tidegate_strip
    if prefix and prefix ~= "" then
        var.tidegate_strip = ""
        local uri = var.uri
        if sub(uri, 1, #prefix) == prefix then
            local rest = sub(uri, #prefix + 1)
            set_uri(sub(rest, 1, 1) == "/" and rest or "/" .. rest, false)
        end
    end
end


-- Where only draining peers are left that might have ended: whether a request has waited long
-- enough for a replacement, so that they are to be asked. What one has waited for this version of
-- the upstream, the next ones need not wait again.
local function is_overdue(upstream, waited)
    if upstream.up > 0 or upstream.draining == 0 then
        return false
    end
    if waited >= min(HOLD_BEFORE_DRAINING, upstream.hold / 2) then
        upstream.overdue = true
    end
    return upstream.overdue
end


-- Waits until a peer can be picked that is not among the tried.
-- @return true; or false and whether that was because too many are waiting already
local function wait(name, tried, started, pause)
    if held >= max_held then
        return false, true
    end
    held = held + 1
    local waiting = true
    -- Without this, nginx would drop the coroutine of a client that leaves, and its place with it.
    on_abort(function()
        if waiting then
            waiting = false
            held = held - 1
        end
        ngx.exit(499)
    end)
    local found = false
    while true do
        local upstream = balancer.lookup(name)
        if not upstream or upstream.hold == 0 then
            break
        end
        local waited = now() - started
        if pause <= 0 and selection.ready(upstream, tried) then
            found = true
            break
        end
        if waited >= (upstream.up > 0 and min(upstream.hold, REFUSING_LIMIT) or upstream.hold) then
            break
        end
        if is_overdue(upstream, waited) then
            last_resort.look(upstream)
        end
        if upstream.probing > 0 and not upstream.hurried then
            upstream.hurried = true
            probe.hurry(name)
        end
        -- Many waiting requests must not keep a worker busy with looking.
        local step = 0.003 + held * 0.00003
        pause = pause - step
        sleep(step)
    end
    waiting = false
    held = held - 1
    return found, false
end


-- Takes a place with a peer whose number of requests is limited, or waits for one.
-- @param full whether all peers that could be asked are known to be full
-- @return whether the request can go on
local function take_place(name, full, tried)
    local admitted, how = queue.wait(name, balancer.lookup, tried)
    if not admitted then
        metrics.add(name, how == "expired" and metrics.QUEUE_EXPIRED or metrics.QUEUE_REFUSED)
        return false
    elseif full or how then
        metrics.add(name, metrics.QUEUE_ADMITTED)
    end
    return true
end


-- Waits before the request has been sent to anybody, where all peers are known to be away or have
-- as many requests as they may have.
local function wait_before()
    local name = var.tidegate_upstream
    local upstream = balancer.lookup(name)
    if not upstream then
        return
    end
    if upstream.hold > 0 and balancer.is_exhausted(upstream) then
        metrics.begin(upstream.stats)
        local found, refused = wait(name, nil, now(), 0)
        metrics.add(name, found and metrics.HELD_RESUMED or refused and metrics.HELD_REFUSED
                    or metrics.HELD_EXPIRED)
    elseif upstream.queue > 0 and not upstream.canary and not upstream.open_until then
        metrics.begin(upstream.stats)
        if not take_place(name, false) then
            return answer(503)
        end
    end
end


--- Body of `rewrite_by_lua` of a location whose requests can be sent only once: they wait before
-- they are sent, not after.
_M.before = wait_before


--- The same for gRPC, where nothing else takes off a context root.
function _M.before_grpc()
    strip_prefix()
    wait_before()
end


-- Has the request proxied again from here, or from the location `elsewhere`.
local function go_on(how, elsewhere)
    var.tidegate_again = how
    strip_prefix()
    ngx.status = ngx.HTTP_OK
    if elsewhere then
        return ngx.exec(elsewhere)
    end
end


-- Whether the request is to be sent to another peer at once, where nginx would not: because the
-- policy of `upstream` says so, or because it has been here before and nginx has but one try then.
local function may_retry(upstream, made)
    return (upstream.retry_on or var.tidegate_again ~= "")
        and selection.ready(upstream, attempts.tried(made, 1, now()))
        and retry.allowed(upstream, made, true)
end


-- Whether a request that a peer has seen may be sent to `upstream` again when it has waited.
local function may_repeat(upstream)
    local on = upstream.retry_on
    return IDEMPOTENT[get_method()] and upstream.policy.retry.tries ~= 1
        and (on and on.error or not on and var.tidegate_retry ~= "off")
end


--- Body of `rewrite_by_lua` of the location that failed requests are led to. Returns if the
-- request is to be proxied again from there.
-- @param any name of the location to proxy it from where a policy has statuses tried again that
--   this one has not; nil where it has all
function _M.fail(any)
    local status, name = ngx.status, var.tidegate_upstream
    if not name or name == "" or status == 503 then
        return answer(status)
    end
    if var.tidegate_unidentified == "1" then
        return answer(502)
    end
    local made, why = attempts.read(), var.tidegate_no_peer
    local upstream = balancer.lookup(name)
    if status == 500 and why == "" and #made == 0 then
        return answer(500)
    end
    var.tidegate_no_peer = ""
    if why == "open" then
        metrics.add(name, metrics.CIRCUIT_REFUSED)
        return answer(503, upstream and circuit.retry_after(upstream))
    elseif why == "led" then
        return go_on("led", upstream and upstream.retry_any and any)
    elseif why == "" and not made.asked then
        health.note_failure(name, upstream, made)
    end
    local origin = balancer.give_up(name)
    if origin ~= name then
        name, upstream = origin, balancer.lookup(origin)
    end
    local elsewhere = upstream and upstream.retry_any and any
    local limit = elsewhere and MAX_ATTEMPTS_ELSEWHERE or MAX_ATTEMPTS
    local repeatable = is_repeatable()
    local attempt, failed_at = tonumber(var.tidegate_attempt) or 0, now()
    if #made > 0 or why ~= selection.FULL then
        var.tidegate_attempt = attempt + 1
        var.tidegate_failed_at = failed_at
    end
    if why == selection.FULL then
        local tried = #made > 0 and attempts.tried(made, 1, failed_at) or nil
        if not repeatable or attempt >= limit or not take_place(name, true, tried) then
            return answer(503)
        elseif tried then
            retry.note(name)
        end
        return go_on("queued", elsewhere)
    end
    if repeatable and attempt < limit and upstream and why == "" and not made.asked
            and may_retry(upstream, made) then
        retry.note(name)
        return go_on("retry", elsewhere)
    end
    local sent, last = was_sent(made), made[#made]
    local timed_out = (last and last.status or status) == 504
    local no_peer, held_since = why == "none", var.tidegate_held_since
    if no_peer and held_since == "" then
        metrics.add(name, metrics.NO_PEER)
    end
    if repeatable and upstream and upstream.hold > 0 and attempt < limit
            and (not sent or not timed_out and may_repeat(upstream)) then
        local started = tonumber(held_since) or now()
        var.tidegate_held_since = started
        local pause = no_peer and 0 or 0.005 * 2 ^ attempt
        health.mark_refused(upstream, made)
        local tried = attempts.tried(made, #made + 1, failed_at)
        local found, refused = wait(name, tried, started, pause)
        if found then
            if held_since == "" then
                metrics.add(name, metrics.HELD_RESUMED)
            end
            return go_on("held", elsewhere)
        end
        metrics.add(name, refused and metrics.HELD_REFUSED or metrics.HELD_EXPIRED)
        upstream = balancer.lookup(name)
    end
    if not sent and (no_peer or not upstream or upstream.up == 0) then
        return answer(503)
    end
    if last and last.answered and last.status >= 400 then
        -- An answer that might have been followed by another one, and was not.
        return answer(last.status)
    end
    return answer(timed_out and 504 or 502)
end


return _M
