--- What becomes of a request that could not be sent to a peer, or whose peers all failed.
--
-- Why: nginx turns that into a 5xx of its own; `conf.d/server.inc` leads it here. Where a
-- replacement is expected (`hold` of the upstream) the request waits and goes on; else it is
-- answered. None of this costs anything as long as requests succeed.

local balancer = require "tidegate.balancer"
local last_resort = require "tidegate.last_resort"
local metrics = require "tidegate.metrics"

local get_method = ngx.req.get_method
local find = string.find
local gsub = string.gsub
local max = math.max
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
-- While peers are there and refuse, they are more likely broken than on their way.
local REFUSING_LIMIT = 3
-- Longer than a replacement commonly takes that is started once the old one has ended.
local HOLD_BEFORE_DRAINING = 3
local RETRY_AFTER = 5
local IDEMPOTENT = {
    GET = true, HEAD = true, OPTIONS = true, TRACE = true, PUT = true, DELETE = true,
}
local REASONS = {
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
local page = "{{status}} {{reason}}\n"


--- Sets how many requests may wait in a worker at a time.
function _M.set_limit(count)
    max_held = count
end


--- Sets the error page: HTML with `{{status}}`, `{{reason}}` and `{{text}}`.
function _M.set_page(text)
    page = text
end


local function answer(status)
    local values = {
        status = status,
        reason = REASONS[status] or "Error",
        text = TEXTS[status] or "Something went wrong on the way to the application.",
    }
    ngx.status = status
    if status == 503 then
        ngx.header["Retry-After"] = RETRY_AFTER
    end
    ngx.header["Content-Type"] = "text/html; charset=utf-8"
    ngx.header["Cache-Control"] = "no-store"
    local body = gsub(page, "{{(%a+)}}", values)
    ngx.header["Content-Length"] = #body
    ngx.print(body)
    return ngx.exit(ngx.HTTP_OK)
end


-- Whether a byte of the request has reached a peer.
local function was_sent()
    return find(var.upstream_bytes_sent or "", "[1-9]") ~= nil
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


-- Waits until a peer can be picked.
-- @return true; or false and whether that was because too many are waiting already
local function wait(name, started, pause)
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
        if pause <= 0 and balancer.ready(upstream) then
            found = true
            break
        end
        if waited >= (upstream.up > 0 and min(upstream.hold, REFUSING_LIMIT) or upstream.hold) then
            break
        end
        if is_overdue(upstream, waited) then
            last_resort.look(upstream)
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


--- Body of `rewrite_by_lua` of the location that failed requests are led to. Returns if the
-- request is to be proxied again.
function _M.fail()
    local status, name = ngx.status, var.tidegate_upstream
    if not name or name == "" or status == 503 then
        return answer(status)
    end
    if var.tidegate_unidentified == "1" then
        return answer(502)
    end
    balancer.note_last_failure(name)
    local no_peer = var.tidegate_no_peer == "1"
    local tried = find(var.upstream_addr or "", "%d:%d") ~= nil
    if status == 500 and not no_peer and not tried then
        return answer(500)
    end
    var.tidegate_no_peer = ""
    local sent = was_sent()
    local attempt = tonumber(var.tidegate_attempt) or 0
    local started = tonumber(var.tidegate_held_since) or now()
    if attempt == 0 and no_peer then
        metrics.add(name, metrics.NO_PEER)
    end
    local upstream = balancer.lookup(name)
    local may = not sent or status ~= 504 and IDEMPOTENT[get_method()]
        and var.tidegate_retry ~= "off"
    if may and attempt < MAX_ATTEMPTS and upstream and upstream.hold > 0 then
        var.tidegate_attempt = attempt + 1
        var.tidegate_held_since = started
        local pause = no_peer and 0 or 0.005 * 2 ^ max(0, attempt)
        local found, refused = wait(name, started, pause)
        if found then
            if attempt == 0 then
                metrics.add(name, metrics.HELD_RESUMED)
            end
            strip_prefix()
            ngx.status = ngx.HTTP_OK
            return
        end
        metrics.add(name, refused and metrics.HELD_REFUSED or metrics.HELD_EXPIRED)
        upstream = balancer.lookup(name)
    end
    if not sent and (no_peer or not upstream or upstream.up == 0) then
        return answer(503)
    end
    return answer(status == 504 and 504 or 502)
end


return _M
